"""How two items are compared: one vector per item, whose inner products are the scores.

A vector joins up to three blocks, each with its share of the score:

    class    posteriors p of the classes: p_image . p_text is the chance that both items are of one class. They are the
             network's, or a mixture of these with those of a kernel classifier (`training.class_head`)
    common   the common representation c at unit length: the cosine, raw or standardised by the training split
    pair     a linear map of the backbone's feature, fitted to pairs (`training.pair_head`): a cosine too

and, where a query bank is used, what QB-Norm (Bogolin et al., CVPR 2022, in the log domain) takes off an item that many
training queries find: log-mean-exp of its scores with a bank of training items of the other modality. Vectors are no
longer than 1, and those of uncertain items shorter: scores are inner products, not cosines.

Shapes: n items, F feature dimensions, E common, C classes, P pair dimensions, K items of the bank, D of a vector."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.models.generator import Generator, Modality
from cmgan_dist.models.kernel_classifier import Kernel, KernelClassifier

Objective = Literal["class", "pair", "both"]
MODALITIES: tuple[Modality, Modality] = ("image", "text")
PREFIX = "scoring/"
"""Of the tensors' names in model.safetensors."""
SPEC = "spec"
"""Name of the tensor that holds the `ScoringSpec`: uint8, JSON."""
STATISTICS = ("_mean", "_std")
"""Ends of the names of tensors that are kept as float64; pair maps and bank were made as float32."""


@dataclass(frozen=True)
class Shares:
    """What each block has of the score (they add up to 1), and how the bank counts."""

    posterior: float = 0.0
    common: float = 1.0
    pair: float = 0.0
    bank: float = 0.0
    """Weight of what the bank takes off a score; 0 is off."""
    sharpness: float = 20.0
    """Factor b of the scores in log-mean-exp(b s) / b over the bank."""


@dataclass(frozen=True)
class ScoringSpec:
    """What was asked of the scoring, and what validation chose for it."""

    objective: Objective
    """What the model's vectors are made for."""
    asked: dict[str, Any]
    """The settings of the config by which this was chosen."""
    shares: dict[Objective, Shares]
    """Objective -> its shares: "pair" alone without classes."""
    standardise: bool = False
    """Common representations by mean and deviation of the training split."""
    validation: dict[Objective, dict[Objective, float]] = field(default_factory=dict)
    """Objective -> measures on the validation split by which its shares were chosen."""
    kernels: dict[Modality, Kernel] = field(default_factory=dict)
    """Modality -> kernel of its class head; empty without one."""
    class_head: float = 0.0
    """Share of the class heads in the posteriors; the network has the rest."""


class Blocks(NamedTuple):
    """The blocks of n items of one modality, float64; None for one that the model has not."""

    posterior: Tensor | None
    """[n, C], no longer than 1."""
    common: Tensor
    """[n, E], unit length."""
    pair: Tensor | None
    """[n, P], unit length."""


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def posterior_of(logits: Tensor, multi_label: bool) -> Tensor:
    """Return the class posteriors of logits [n, C], float64, each row no longer than 1."""
    if multi_label:
        return logits.double().sigmoid() / math.sqrt(logits.shape[1])
    return logits.double().softmax(1)


class Scoring(nn.Module):
    """The scoring of a model: its statistics, pair maps and bank, all float64, and the shares that are in use."""

    def __init__(self, spec: ScoringSpec, tensors: Mapping[str, Tensor], multi_label: bool) -> None:
        """`tensors`: what `tensors` returns, by name. `multi_label`: posteriors are a sigmoid a class."""
        super().__init__()
        self.spec, self.multi_label = spec, multi_label
        self.shares = spec.shares[spec.objective]
        for name, tensor in tensors.items():
            if name != SPEC:
                self.register_buffer(name, tensor.double())
        for modality in spec.kernels:
            self._class_head(modality)

    @classmethod
    def plain(cls) -> Scoring:
        """Return the scoring of a model whose training has not ended: the cosine of common representations."""
        return cls(ScoringSpec("pair", {}, {"pair": Shares()}), {}, False)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], multi_label: bool) -> Scoring:
        """Return the scoring that `tensors` of a saved model describe. Raises ValueError, KeyError or TypeError when
        they do not."""
        record = json.loads(bytes(tensors[SPEC].tolist()))
        record["shares"] = {name: Shares(**shares) for name, shares in record["shares"].items()}
        return cls(ScoringSpec(**record), tensors, multi_label)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that `read` needs, by name."""
        text = json.dumps(dataclasses.asdict(self.spec), sort_keys=True).encode()
        kept = {n: x if n.endswith(STATISTICS) else x.float() for n, x in self.named_buffers()}
        return {SPEC: torch.frombuffer(bytearray(text), dtype=torch.uint8), **kept}

    def made_for(self, objective: Objective) -> Scoring:
        """Return the same scoring with the shares of another objective."""
        spec = dataclasses.replace(self.spec, objective=objective)
        return Scoring(spec, dict(self.named_buffers()), self.multi_label)

    def _tensor(self, name: str) -> Tensor | None:
        return self._buffers.get(name)

    def _class_head(self, modality: Modality) -> KernelClassifier:
        return KernelClassifier.of(self._buffers, modality, self.spec.kernels[modality])

    def dim(self, common: int, classes: int) -> int:
        """Return D for E = `common` and C = `classes`."""
        shares, weight = self.shares, self._tensor("image_pair_weight")
        dim = classes * (shares.posterior > 0) + common * (shares.common > 0) + 2 * (shares.bank > 0)
        return dim + (weight.shape[1] if shares.pair and weight is not None else 0)

    def blocks(self, modality: Modality, feature: Tensor, common: Tensor, logits: Tensor | None) -> Blocks:
        """Return the blocks of items with features [n, F], common representations [n, E] and class logits [n, C]."""
        posterior = pair = None
        if logits is not None:
            posterior, share = posterior_of(logits, self.multi_label), self.spec.class_head
            if share:
                other = posterior_of(self._class_head(modality)(feature), self.multi_label)
                posterior = (1 - share) * posterior + share * other
        common = common.double()
        mean, std = self._tensor(f"{modality}_mean"), self._tensor(f"{modality}_std")
        if self.spec.standardise and mean is not None and std is not None:
            common = (common - mean) / torch.where(std > 0, std, 1.0)
        weight, bias = self._tensor(f"{modality}_pair_weight"), self._tensor(f"{modality}_pair_bias")
        if weight is not None and bias is not None:
            pair = _unit(F.linear(feature.double(), weight.T, bias))
        return Blocks(posterior, _unit(common), pair)

    def bank_blocks(self, modality: Modality) -> Blocks | None:
        """Return the blocks of the bank's items of a modality, None without a bank."""
        posterior, common, pair = (self._tensor(f"{modality}_bank_{name}") for name in Blocks._fields)
        return None if common is None else Blocks(posterior, common, pair)

    def joined(self, blocks: Blocks) -> Tensor:
        """Return what the blocks make by their shares, without the bank: float64 [n, D'], no longer than 1."""
        shares = (self.shares.posterior, self.shares.common, self.shares.pair)
        named = zip(shares, blocks, strict=True)
        return torch.cat([math.sqrt(share) * block for share, block in named if share and block is not None], dim=1)

    def vectors_of(self, modality: Modality, blocks: Blocks) -> Tensor:
        """Return the vectors of items by their blocks, float32 [n, D], no longer than 1."""
        made, shares = self.joined(blocks), self.shares
        bank = self.bank_blocks("text" if modality == "image" else "image") if shares.bank else None
        if bank is not None:
            queries = self.joined(bank)
            scores = shares.sharpness * made @ queries.T
            found = (scores.logsumexp(1) - math.log(len(queries))) / shares.sharpness * shares.bank
            columns = [-found, torch.ones_like(found)]  # image . text = score - found(image) - found(text)
            extra = torch.stack(columns if modality == "image" else columns[::-1], dim=1)
            made = torch.cat([made, extra], dim=1) / math.sqrt(2 + shares.bank**2)
        return made.float()

    def forward(self, modality: Modality, feature: Tensor, common: Tensor, logits: Tensor | None) -> Tensor:
        """Return the vectors of items, float32 [n, D], no longer than 1; the inputs are those of `blocks`."""
        return self.vectors_of(modality, self.blocks(modality, feature, common, logits))


def class_logits(generator: Generator, modality: Modality, common: Tensor) -> Tensor | None:
    """Return the class logits [n, C] of common representations [n, E], None of a generator without classes."""
    if not len(generator.classifiers):
        return None
    logits: Tensor = generator.classifiers[0 if modality == "image" else -1](common)
    return logits.float()
