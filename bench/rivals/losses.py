"""What the rival methods minimise: pure functions of tensors, each with its source. All return a scalar [].

Shapes: B pairs of a batch, E dimensions of the common space, C classes; row i of the image side u and of the text side
v are a pair. `same` is bool [B, B]: whether the items i and j share a class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines [n, m] of the rows of x [n, E] with those of y [m, E]."""
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


# ---------------------------------------------------------------------------------------------- DSCMR


def dscmr_label_space(image_scores: Tensor, text_scores: Tensor, labels: Tensor) -> Tensor:
    """Return J1 = (||P^T U - Y||_F + ||P^T V - Y||_F) / B of class scores [B, C] and labels [B, C].

    Zhen et al., "Deep Supervised Cross-modal Retrieval", CVPR 2019."""
    target = labels.to(image_scores.dtype)
    return ((image_scores - target).norm() + (text_scores - target).norm()) / len(target)


def dscmr_common_space(u: Tensor, v: Tensor, same: Tensor) -> Tensor:
    """Return J2 of u and v [B, E]: the negative log-likelihood of who shares a class with whom, between the
    modalities and within each, with the logits cos / 2.

    J2 = sum over (x, y) in {(u, v), (u, u), (v, v)} of mean over ij of log(1 + exp(G_ij)) - same_ij G_ij, G_ij =
    cos(x_i, y_j) / 2 (Zhen et al., CVPR 2019, eq. 6)."""
    total = u.new_zeros(())
    for x, y in ((u, v), (u, u), (v, v)):
        logit = cosines(x, y) / 2
        total = total + (F.softplus(logit) - same * logit).mean()
    return total


def dscmr_invariance(u: Tensor, v: Tensor) -> Tensor:
    """Return J3 = ||U - V||_F / B of the pairs u and v [B, E] (Zhen et al., CVPR 2019)."""
    return (u - v).norm() / len(u)


# ---------------------------------------------------------------------------------------------- ACMR


class _Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """Return x as it is; its gradient is that of the output times -`weight` (Ganin & Lempitsky, ICML 2015)."""
    reversed_x: Tensor = _Reversal.apply(x, weight)
    return reversed_x


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over rows of -sum_c y_c log softmax(logits)_c, [B, C] both; y are the labels, each row divided by
    how many it has. A row without labels counts as 0."""
    target = labels.to(logits.dtype)
    target = target / target.sum(1, keepdim=True).clamp_min(1)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def acmr_structure(u: Tensor, v: Tensor, same: Tensor, margin: float, weight: float) -> Tensor:
    """Return the structure-preserving loss of u and v [B, E], over all triplets of the batch, both ways.

    L = mean over i of [mean over j of one class of d(u_i, v_j) + `weight` * mean over k of other classes of
    max(0, `margin` - d(u_i, v_k))], d the Euclidean distance, and the same from v to u (Wang et al., "Adversarial
    Cross-Modal Retrieval", ACM MM 2017, L_imi)."""
    squared = (u**2).sum(1, keepdim=True) + (v**2).sum(1) - 2 * u @ v.T
    distance = squared.clamp_min(1e-8).sqrt()
    near = distance * same
    far = (margin - distance).clamp_min(0) * ~same
    total = u.new_zeros(())
    for way in (0, 1):
        positives, negatives = same.sum(way).clamp_min(1), (~same).sum(way).clamp_min(1)
        total = total + (near.sum(way) / positives + weight * far.sum(way) / negatives).mean()
    return total


def acmr_modality(image_logit: Tensor, text_logit: Tensor) -> Tensor:
    """Return L_adv = -mean[log D(u)] - mean[log(1 - D(v))] of a modality classifier's logits [B] and [B].

    Wang et al., ACM MM 2017; the classifier minimises it, and `reverse_gradient` before it lets the embeddings maximise
    it."""
    return F.softplus(-image_logit).mean() + F.softplus(text_logit).mean()


# ---------------------------------------------------------------------------------------------- CLIP4CMR


def prototype_contrast(u: Tensor, v: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the prototype contrastive loss of u and v [B, E] with prototypes [C, E] and labels [B, C].

    -mean log of exp(cos(x_i, c_y) / t) / sum_c exp(cos(x_i, c) / t), for both modalities (Zeng & Mao, "A Comprehensive
    Empirical Study of Vision-Language Pre-trained Model for Supervised Cross-Modal Retrieval", 2022)."""
    image, text = (cosines(x, prototypes) / temperature for x in (u, v))
    return soft_cross_entropy(image, labels) + soft_cross_entropy(text, labels)


# ---------------------------------------------------------------------------------------------- pairs


def info_nce(u: Tensor, v: Tensor, scale: Tensor | float) -> Tensor:
    """Return the symmetric InfoNCE of the pairs u and v [B, E], cosines times `scale` as logits.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, figure 3."""
    logits, own = cosines(u, v) * scale, torch.arange(len(u), device=u.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def max_of_hinges(u: Tensor, v: Tensor, margin: float) -> Tensor:
    """Return the loss of the hardest negatives of u and v [B, E]: mean over i of
    max_j [margin - s_ii + s_ij]_+ + max_j [margin - s_ii + s_ji]_+, j not i, s the cosine.

    Faghri et al., "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", BMVC 2018, eq. 6."""
    similarity = cosines(u, v)
    own = similarity.diag()
    others = similarity.masked_fill(torch.eye(len(u), dtype=torch.bool, device=u.device), -2.0)
    text, image = others.amax(1), others.amax(0)
    return ((margin - own + text).clamp_min(0) + (margin - own + image).clamp_min(0)).mean()
