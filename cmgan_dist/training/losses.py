"""Losses as pure functions of tensors, each with its source. Logits and losses are fp32. All return scalars.

Shapes: B rows, G rows of all processes (gathered), E dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.kernels.dispatch import use_triton


def discriminator_loss(kind: str, real: Tensor, fakes: Sequence[tuple[Tensor, float, Tensor | None]]) -> Tensor:
    """Real -> 1, every fake -> 0 with its weight.

    `real`: logits [B]. `fakes`: (logits [B], weight, mask bool [B] or None): masked-out rows count as zero loss.
    bce: Peng & Qi (2019), eqs. for D_I, D_T, D_CI, D_CT. hinge: Lim & Ye (2017). wgan-gp: Gulrajani et al. (2017)."""
    if kind == "bce":
        total = F.softplus(-real).mean()
    elif kind == "hinge":
        total = F.relu(1 - real).mean()
    else:
        total = -real.mean()
    for logits, weight, mask in fakes:
        term = F.softplus(logits) if kind == "bce" else F.relu(1 + logits) if kind == "hinge" else logits
        if mask is not None:
            term = term * mask
        total = total + weight * term.mean()
    return total


def fused_discriminator_loss(
    kind: str, real: Tensor, fakes: Sequence[tuple[Tensor, float, Tensor | None]], kernels: str
) -> Tensor:
    """`discriminator_loss`; bce in one launch, gradient included, where `kernels` (model.kernels) allows it."""
    fits = kind == "bce" and len(fakes) in (1, 2) and fakes[0][2] is None and all(len(f[0]) == len(real) for f in fakes)
    if not (fits and use_triton("discriminator loss", kernels, real)):
        return discriminator_loss(kind, real, fakes)
    from cmgan_dist.kernels.bce import discriminator_bce  # here: it imports Triton

    fake, weight, _ = fakes[0]
    mismatched, mismatched_weight, mask = fakes[1] if len(fakes) > 1 else (None, 0.0, None)
    loss: Tensor = discriminator_bce(real, fake, mismatched, mask, weight, mismatched_weight)[0]
    return loss


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Fake logits [B] -> 1: the non-saturating loss (Goodfellow et al., 2014) for bce, else -mean."""
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()


def classification(logits: Tensor, labels: Tensor, multi: bool, smoothing: float = 0.0) -> Tensor:
    """Semantic constraint on class logits [B, C] with labels bool [B, C].

    Single label: softmax cross-entropy. Multi-label: mean binary cross-entropy over the classes."""
    if multi:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.float().argmax(1), label_smoothing=smoothing)


def info_nce(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, first: int, temperature: float
) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al., 2018) of pairs against gathered negatives.

    image, text [B, E] of this process; all_image, all_text [G, E] of all, in which this process's rows start at
    `first`."""
    image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
    all_image, all_text = F.normalize(all_image.float(), dim=1), F.normalize(all_text.float(), dim=1)
    target = torch.arange(first, first + len(image), device=image.device)
    to_text = F.cross_entropy(image @ all_text.T / temperature, target)
    to_image = F.cross_entropy(text @ all_image.T / temperature, target)
    return (to_text + to_image) / 2


def class_contrastive(query: Tensor, gallery: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss, L_out (Khosla et al., NeurIPS 2020, eq. 2), from one modality to the other.

    query [B, E], gallery [G, E], positive bool [B, G]: pairs that share a class. Rows without one count as 0."""
    scores = F.normalize(query.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T / temperature
    log_p = F.log_softmax(scores, dim=1)
    weight = positive.float()
    return -((log_p * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()


def squared_gradient_norm(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Mean over rows of |d logits / d inputs|^2, differentiable: R1 (Mescheder et al., ICML 2018, eq. 9) needs it."""
    gradients = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    return torch.stack([g.float().square().sum(1) for g in gradients]).sum(0).mean()


def gradient_penalty(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """WGAN-GP's (|gradient| - 1)^2 at interpolated inputs (Gulrajani et al., 2017, eq. 3)."""
    gradients = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    norm = torch.stack([g.float().square().sum(1) for g in gradients]).sum(0).add(1e-12).sqrt()
    return (norm - 1).square().mean()
