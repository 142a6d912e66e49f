"""What is minimised: losses as pure functions of tensors, each with its source. All return a scalar [] in fp32.

phases.py says which phase minimises which of them, and with what weight.

Shapes: B rows of this process, G rows of all processes (gathered), E dimensions of the common space, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.kernels.dispatch import use_triton

Fakes = Sequence[tuple[Tensor, float, Tensor | None]]
"""What a discriminator shall call fake: (logits [B], weight, mask) each. A mask, bool [B], says which rows count (the
others add zero to the mean); None when all do."""


def discriminator_loss(kind: str, real: Tensor, fakes: Fakes) -> Tensor:
    """Return the loss of a discriminator that shall call `real`, logits [B], real and every one of `fakes` fake.

    With D the sigmoid of logits x, w the weight of a fake, and each fake's term a mean over rows:

        bce      mean[-log D(real)] + sum w mean[-log(1 - D(fake))]          Peng, Qi & Yuan (2019), for all four D
        hinge    mean[max(0, 1 - x_real)] + sum w mean[max(0, 1 + x_fake)]   Lim & Ye, arXiv 1705.02894 (2017)
        wgan-gp  -mean[x_real] + sum w mean[x_fake]                          Gulrajani et al. (NIPS 2017), no penalty

    """
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


def fused_discriminator_loss(kind: str, real: Tensor, fakes: Fakes, kernels: str) -> Tensor:
    """Return `discriminator_loss`; bce takes one launch for value and gradient where `kernels` allows it.

    `kernels`: model.kernels, which `dispatch.use_triton` reads."""
    fits = kind == "bce" and len(fakes) in (1, 2) and fakes[0][2] is None and all(len(f[0]) == len(real) for f in fakes)
    if not (fits and use_triton("discriminator loss", kernels, real)):
        return discriminator_loss(kind, real, fakes)
    from cmgan_dist.kernels.bce import discriminator_bce  # here: it imports Triton

    fake, weight, _ = fakes[0]
    mismatched, mismatched_weight, mask = fakes[1] if len(fakes) > 1 else (None, 0.0, None)
    loss: Tensor = discriminator_bce(real, fake, mismatched, mask, weight, mismatched_weight)[0]
    return loss


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Return the loss of a generator whose `fake` logits x [B] a discriminator shall call real.

    bce: mean[-log D(fake)], the non-saturating loss (Goodfellow et al., NIPS 2014, section 3). Else -mean[x]."""
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()


def classification(logits: Tensor, labels: Tensor, multi: bool, smoothing: float = 0.0) -> Tensor:
    """Return the semantic constraint on class logits [B, C], given labels bool [B, C].

    Single label: mean softmax cross-entropy, as in Peng, Qi & Yuan (2019), with label smoothing. Multi-label (`multi`):
    mean binary cross-entropy over rows and classes."""
    if multi:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.float().argmax(1), label_smoothing=smoothing)


def info_nce(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, first: int, temperature: float
) -> Tensor:
    """Return InfoNCE (van den Oord et al., 2018, eq. 4) of pairs against gathered negatives, mean of both directions.

    `image`, `text`: [B, E] of this process. `all_image`, `all_text`: [G, E] of all processes, in which this process's
    rows start at `first`. Scores are cosines over `temperature`."""
    image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
    all_image, all_text = F.normalize(all_image.float(), dim=1), F.normalize(all_text.float(), dim=1)
    target = torch.arange(first, first + len(image), device=image.device)
    to_text = F.cross_entropy(image @ all_text.T / temperature, target)
    to_image = F.cross_entropy(text @ all_image.T / temperature, target)
    return (to_text + to_image) / 2


def class_contrastive(query: Tensor, gallery: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss L_out (Khosla et al., NeurIPS 2020, eq. 2) from one modality to the other.

    `query`: [B, E]. `gallery`: [G, E]. `positive`: bool [B, G], the pairs that share a class; rows without one add zero
    to the mean. Scores are cosines over `temperature`."""
    scores = F.normalize(query.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T / temperature
    log_p = F.log_softmax(scores, dim=1)
    weight = positive.float()
    return -((log_p * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()


def squared_gradient_norm(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean over rows of |d logits / d inputs|^2, which R1 penalises (Mescheder et al., ICML 2018, eq. 9).

    `logits`: [B]. `inputs`: [B, ...] each, from which they were made. The result can be differentiated again."""
    gradients = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    return torch.stack([g.float().square().sum(1) for g in gradients]).sum(0).mean()


def gradient_penalty(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean over rows of (|d logits / d inputs| - 1)^2, WGAN-GP's penalty (Gulrajani et al., 2017, eq. 3).

    `logits`: [B]. `inputs`: [B, ...] each, interpolated between real and fake, from which the logits were made."""
    gradients = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    norm = torch.stack([g.float().square().sum(1) for g in gradients]).sum(0).add(1e-12).sqrt()
    return (norm - 1).square().mean()
