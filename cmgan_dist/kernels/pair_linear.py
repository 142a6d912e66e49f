"""How the first layer of an inter-modality discriminator runs on (common, feature) without concatenating the two.

The weight [H, E + F] stays one parameter (spectral normalisation sees it whole); its columns are used as two halves.
Real and fake rows condition on the same feature, whose half is then computed once: forward, and, from the summed
gradient, backward. Where the feature needs no gradient none is computed for it: in the generator's phases that is most
of the backward GEMM. Measured in docs/kernels.md.

Shapes: R rows in all, K groups of n_k rows, E and F input dimensions, H outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _PairLinear(torch.autograd.Function):
    """Twice differentiable: with a graph of the backward asked for, it is made of differentiable operations."""

    @staticmethod
    def forward(
        ctx: Any, common: Tensor, weight: Tensor, groups: list[int], which: list[int], *features: Tensor
    ) -> Tensor:
        """Return [R, H]; `which` has, for each group, the index of its feature."""
        split = common.shape[1]
        halves = [feature @ weight[:, split:].T for feature in features]
        out = torch.cat([halves[i] for i in which]) if len(which) > 1 else halves[0]
        out.addmm_(common, weight[:, :split].T)
        ctx.save_for_backward(common, weight, *features)
        ctx.groups, ctx.which = groups, which
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        common, weight, *features = ctx.saved_tensors
        grad, split = grads[0], common.shape[1]
        want_common, want_weight, _, _, *want_features = ctx.needs_input_grad
        per_feature: list[Tensor] = []
        if want_weight or any(want_features):
            parts = grad.split(ctx.groups)
            for i in range(len(features)):
                first, *others = [part for part, which in zip(parts, ctx.which, strict=True) if which == i]
                for other in others:
                    first = first + other
                per_feature.append(first)
        d_weight = None
        if want_weight:
            left = torch.cat(per_feature).T if len(features) > 1 else per_feature[0].T
            right = torch.cat(features) if len(features) > 1 else features[0]
            if torch.is_grad_enabled():
                d_weight = torch.cat([grad.T @ common, left @ right], 1)
            else:  # each half written in place: joining them costs as much as the GEMM at batch 64
                d_weight = torch.empty_like(weight)
                torch.mm(grad.T, common, out=d_weight[:, :split])
                torch.mm(left, right, out=d_weight[:, split:])
        d_features = [
            g @ weight[:, split:] if want else None
            for g, want in zip(per_feature or features, want_features, strict=True)
        ]
        return grad @ weight[:, :split] if want_common else None, d_weight, None, None, *d_features


def pair_linear(common: Tensor, feature: Tensor | Sequence[Tensor], groups: Sequence[int], weight: Tensor) -> Tensor:
    """Return concat(common, feature) @ weight.T, [R, H].

    `common`: [R, E]. `feature`: [R, F], or a tensor [n_k, F] per group; a tensor that stands for several groups is used
    once. `groups`: row counts n_1 .. n_K, read in the second case. `weight`: [H, E + F]. Runs in autocast's dtype where
    that is on, else in common's. Raises ValueError when rows or widths do not fit."""
    if isinstance(feature, Tensor):
        feature, groups = [feature], [len(common)]
    for k, (rows, part) in enumerate(zip(groups, feature, strict=True)):
        if len(part) != rows or common.shape[1] + part.shape[1] != weight.shape[1]:
            raise ValueError(
                f"group {k} has {rows} rows of {common.shape[1]} and a feature {list(part.shape)}, which do not fit a "
                f"weight {list(weight.shape)}"
            )
    if sum(groups) != len(common):
        raise ValueError(f"groups {list(groups)} do not add up to {len(common)} rows")
    distinct: list[Tensor] = []
    which = []
    for part in feature:
        index = next((i for i, known in enumerate(distinct) if known is part), len(distinct))
        distinct += [part] if index == len(distinct) else []
        which.append(index)
    device = common.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else common.dtype
    out: Tensor = _PairLinear.apply(
        common.to(dtype), weight.to(dtype), list(groups), which, *(part.to(dtype) for part in distinct)
    )
    return out
