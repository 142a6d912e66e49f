"""What happens to a model when its training has ended: the scoring (`models.scoring`) that validation likes best.

First the heads are fitted, for pairs and for classes; then validation chooses what share the class head has of the
posteriors, and for each objective what share each block has of the score and whether a query bank counts. Everything is
measured by the metrics that evaluation reports, on the vectors that an index would hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.config.fields import EvalConfig
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.models.generator import Modality
from cmgan_dist.models.kernel_classifier import Kernel
from cmgan_dist.models.scoring import MODALITIES, Blocks, Objective, Scoring, ScoringSpec, Shares
from cmgan_dist.retrieval.embed import Embedded
from cmgan_dist.retrieval.metrics import Embeddings, evaluate, l2_normalise, recall_of, score_of, zscore
from cmgan_dist.training.class_head import fit_class_head, log_likelihood
from cmgan_dist.training.pair_head import fit_pair_head

SAMPLES = 20_000
"""Samples of the training split, at most, to which the heads and the statistics are fitted."""
IMAGES, CAPTIONS = 1000, 5
"""Images of the validation split and captions of each (with labels one) on which shares are chosen, at most."""
COARSE, FINE = 5, (0.1, 0.05, 0.025)
"""Shares are multiples of 1 / COARSE first; then so much moves from one block to another where that helps."""
CLASS_HEAD, MAP_SLACK = 0.5, 0.01
"""Share of the class head in the posteriors where it is used, and what MAP of the validation split may lose by it.
Likelihood decides: MAP of a small split says by chance which of two good classifiers is better."""
AP_CHANCE = 0.12
"""By how much MAP of two scorings can differ by chance, times the root of the number of queries: about two standard
errors."""
BANKS = tuple(itertools.product((0.5, 1.0), (10.0, 20.0, 30.0)))
"""(weight, sharpness) of the query bank that are tried."""
ALONE = {"cosine": Shares(), "zscore": Shares(), "posterior": Shares(1.0, 0.0)}
"""Shares where `eval.score` names one way."""
BLOCKS = ("posterior", "common", "pair")


def resolved_objective(config: EvalConfig, labelled: bool) -> Objective:
    """Return what `eval.objective` asks for: with auto both ends of labelled data, pairs of others."""
    if not labelled:
        return "pair"
    return "both" if config.objective == "auto" else config.objective


def asked_of(config: EvalConfig, labelled: bool) -> dict[str, Any]:
    """Return what decides a choice beside model and data."""
    objective = resolved_objective(config, labelled)
    named = {name: getattr(config, name) for name in ("score", "pair_head", "class_head", "bank")}
    return {"objective": objective, **named}


def measures_of(data: Embeddings) -> dict[Objective, float]:
    """Return what vectors reach for each objective: MAP for class, Recall@10 for pair, the mean of both for both."""
    metrics = evaluate(data, all_modal=False, map_ks=(), recall_ks=(10,))
    pair = recall_of(metrics)
    if data.labels is None:
        return {"pair": pair}
    found = metrics["map/mean"]
    return {"pair": pair} if found is None else {"class": found, "pair": pair, "both": (found + pair) / 2}


def _alone(embedded: Embedded, config: EvalConfig, multi_label: bool) -> Iterator[Embeddings]:
    """Give the vectors of one block alone, each that `eval.score` allows. Z-scores are those of the set itself."""
    if config.score in ("auto", "cosine"):
        yield embedded.vectors(Scoring.plain())
    if config.score in ("auto", "zscore"):
        image, text = (l2_normalise(zscore(side.common)) for side in (embedded.image, embedded.text))
        yield Embeddings(image, text, embedded.owner, embedded.labels)
    if embedded.labels is not None and config.score in ("auto", "posterior"):
        posterior = ScoringSpec("class", {}, {"class": ALONE["posterior"]})
        yield embedded.vectors(Scoring(posterior, {}, multi_label))


def validation_of(
    embedded: Embedded, config: EvalConfig, multi_label: bool, parallel: Parallel
) -> tuple[float, dict[str, Any]]:
    """Return what validation maximises during training, and the metrics (`metrics.evaluate`) by which MAP is largest.
    Every process calls it.

    The score is the most that any one block reaches: of MAP with `eval.objective` class, of Recall@10 with pair, the
    mean of both with both; without labels of the mean of Recall@1, 5 and 10. Raises BadInput where there is no MAP."""
    ways = [evaluate(vectors, all_modal=False, parallel=parallel) for vectors in _alone(embedded, config, multi_label)]
    best = max(ways, key=score_of)
    if embedded.labels is None:
        return score_of(best), best
    recall = max(recall_of(metrics) for metrics in ways)
    scores = {"class": score_of(best), "pair": recall, "both": (score_of(best) + recall) / 2}
    return scores[resolved_objective(config, labelled=True)], best


@dataclass
class _Choice:
    """Candidates and what they reach on a part of the validation split."""

    scoring: Scoring
    image: Blocks
    text: Blocks
    owner: Tensor
    labels: Tensor | None
    known: dict[Shares, dict[Objective, float]]

    def measured(self, shares: Shares) -> dict[Objective, float]:
        """Return what shares reach for each objective."""
        if shares not in self.known:
            self.scoring.shares = shares
            image, text = self.scoring.vectors_of("image", self.image), self.scoring.vectors_of("text", self.text)
            self.known[shares] = measures_of(Embeddings(image, text, self.owner, self.labels))
        return self.known[shares]

    def likelihood(self, multi_label: bool) -> float:
        """Return the mean log likelihood that labelled items have by the posteriors, of both modalities."""
        assert self.labels is not None
        found = []
        for blocks, labels in ((self.image, self.labels), (self.text, self.labels[self.owner])):
            assert blocks.posterior is not None
            labelled = labels.any(1)
            found.append(log_likelihood(blocks.posterior[labelled], labels[labelled], multi_label))
        return sum(found) / 2

    def climbed(self, objective: Objective, blocks: list[str]) -> Shares:
        """Return the best known shares for an objective, after moving shares between blocks while that helps."""

        def reached(shares: Shares) -> float:
            return self.measured(shares).get(objective, 0.0)

        best = max(self.known, key=reached)
        for step in FINE:
            moves = [_moved(best, a, b, step) for a, b in itertools.permutations(blocks, 2)]
            candidate = max((each for each in moves if each is not None), key=reached, default=best)
            if reached(candidate) > reached(best):
                best = candidate
        return best

    def settled(self, objective: Objective, blocks: list[str]) -> Shares:
        """Return the shares for an objective: those of `climbed`, but for classes the best block alone where a mixture
        gains no more than chance."""
        best = self.climbed(objective, blocks)
        if objective != "class":
            return best
        alone = max((_shares_of({block: 1.0}) for block in blocks), key=lambda each: self.measured(each)["class"])
        gain = self.measured(best)["class"] - self.measured(alone)["class"]
        return best if gain > AP_CHANCE / math.sqrt(len(self.image.common) + len(self.text.common)) else alone


def _shares_of(parts: Mapping[str, float]) -> Shares:
    """Return shares of the blocks that are named; the others have none."""
    return Shares(**{**dict.fromkeys(BLOCKS, 0.0), **parts})


def _moved(shares: Shares, source: str, target: str, step: float) -> Shares | None:
    left = round(getattr(shares, source) - step, 6)
    if left < 0:
        return None
    return dataclasses.replace(shares, **{source: left, target: round(getattr(shares, target) + step, 6)})


def _lattice(blocks: list[str]) -> list[Shares]:
    """All shares of some blocks in multiples of 1 / COARSE."""
    counts = itertools.product(range(COARSE + 1), repeat=len(blocks))
    return [
        _shares_of({block: n / COARSE for block, n in zip(blocks, each, strict=True)})
        for each in counts
        if sum(each) == COARSE
    ]


def _some(embedded: Embedded) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of images and of texts on which shares are chosen, and the texts' owners among those images."""
    n = len(embedded.keys)
    images = torch.unique(torch.linspace(0, n - 1, min(n, IMAGES)).round().long())
    place = torch.full((n,), -1)
    place[images] = torch.arange(len(images))
    most = CAPTIONS if embedded.labels is None else 1
    number = torch.arange(len(embedded.owner)) - torch.searchsorted(embedded.owner, embedded.owner)
    texts = ((place[embedded.owner] >= 0) & (number < most)).nonzero()[:, 0]
    return images, texts, place[embedded.owner[texts]]


def _bank(scoring: Scoring, train: Embedded, size: int, seed: int) -> dict[str, Tensor]:
    """Return the blocks of `size` training items of each modality by the names that `Scoring` has for them."""
    rng, out = np.random.default_rng(seed), dict[str, Tensor]()
    for modality, made in zip(MODALITIES, (train.image, train.text), strict=True):
        rows = torch.from_numpy(np.sort(rng.permutation(len(made.common))[:size]))
        named = zip(Blocks._fields, made.blocks(scoring, modality, rows), strict=True)
        out |= {f"{modality}_bank_{name}": block.float() for name, block in named if block is not None}
    return out


@dataclass
class _Chooser:
    """What a choice is made from."""

    train: Embedded
    val: Embedded
    asked: dict[str, Any]
    multi_label: bool
    seed: int
    kernels: dict[Modality, Kernel] = field(default_factory=dict)
    class_head: float = 0.0
    """Kernels and share of the class head, as in `ScoringSpec`."""

    def choice(self, tensors: Mapping[str, Tensor], standardise: bool) -> _Choice:
        """Return a choice among shares, with nothing measured yet."""
        objective = self.asked["objective"]
        shares: dict[Objective, Shares] = {objective: Shares()}
        spec = ScoringSpec(objective, self.asked, shares, standardise, {}, self.kernels, self.class_head)
        scoring = Scoring(spec, tensors, self.multi_label)
        images, texts, owner = _some(self.val)
        image = self.val.image.blocks(scoring, "image", images)
        text = self.val.text.blocks(scoring, "text", texts)
        labels = None if self.val.labels is None else self.val.labels[images]
        return _Choice(scoring, image, text, owner, labels, {})

    def add_class_head(self, tensors: dict[str, Tensor], say: Callable[[str], None]) -> None:
        """Fit the class head, and add it to `tensors` where validation is likelier by its share in the posteriors."""
        heads = fit_class_head(self.train.features, self.val.features, self.multi_label, self.seed, say)
        if heads is None:
            return
        fitted = {name: tensor for modality, head in heads.items() for name, tensor in head.tensors(modality).items()}
        kernels = {m: heads[m].kernel for m in MODALITIES}
        plain = self.choice(tensors, standardise=False)
        mixed = dataclasses.replace(self, kernels=kernels, class_head=CLASS_HEAD).choice({**tensors, **fitted}, False)
        maps = [each.measured(ALONE["posterior"]).get("class", 0.0) for each in (plain, mixed)]
        found = [each.likelihood(self.multi_label) for each in (plain, mixed)]
        used = found[1] > found[0] and maps[1] > maps[0] - MAP_SLACK
        changes = ", ".join(f"{name} {a:.4f} -> {b:.4f}" for name, (a, b) in (("log likelihood", found), ("MAP", maps)))
        say(f"class head: {'half' if used else 'none'} of the posteriors, validation {changes}")
        if used:
            tensors |= fitted
            self.kernels, self.class_head = kernels, CLASS_HEAD

    def mixed(self, tensors: dict[str, Tensor]) -> tuple[_Choice, dict[Objective, Shares]]:
        """Choose shares of all blocks for each objective; a bank that one of them uses is added to `tensors`."""
        both = [self.choice(tensors, standardise) for standardise in (False, True)]
        chosen = max(both, key=lambda each: list(each.measured(Shares()).values())[-1])
        blocks = ["common", *["posterior"] * (chosen.image.posterior is not None)]
        blocks += ["pair"] * (chosen.image.pair is not None)
        for each in _lattice(blocks):
            chosen.measured(each)
        shares = {objective: chosen.settled(objective, blocks) for objective in chosen.measured(Shares())}
        if not self.asked["bank"]:
            return chosen, shares
        bank = _bank(chosen.scoring, self.train, self.asked["bank"], self.seed)
        chosen = self.choice({**tensors, **bank}, chosen.scoring.spec.standardise)
        for objective, plain in shares.items():
            with_bank = [dataclasses.replace(plain, bank=weight, sharpness=sharpness) for weight, sharpness in BANKS]
            shares[objective] = max([plain, *with_bank], key=lambda each: chosen.measured(each)[objective])
        if any(each.bank for each in shares.values()):
            tensors |= bank
        return chosen, shares


def choose_scoring(
    train: Embedded, val: Embedded, config: EvalConfig, multi_label: bool, seed: int, say: Callable[[str], None]
) -> Scoring:
    """Return the scoring that validation chooses for each objective, by `config`.

    `train`: at most about SAMPLES samples of the training split. `seed`: of the heads' draws and the bank's.
    `say` gets lines for people."""
    asked = asked_of(config, val.labels is not None)
    tensors: dict[str, Tensor] = {}
    for modality, common in (("image", train.image.common.double()), ("text", train.text.common.double())):
        tensors |= {f"{modality}_mean": common.mean(0), f"{modality}_std": common.std(0, correction=0)}
    chooser = _Chooser(train, val, asked, multi_label, seed)
    if config.score == "auto":
        head = fit_pair_head(train.features, val.features, seed, say) if config.pair_head else None
        tensors |= {} if head is None else head.tensors()
        if config.class_head and val.labels is not None:
            chooser.add_class_head(tensors, say)
        chosen, shares = chooser.mixed(tensors)
    else:
        alone = Shares() if val.labels is None else ALONE[config.score]
        chosen = chooser.choice(tensors, config.score == "zscore")
        shares = dict.fromkeys(chosen.measured(alone), alone)
    validation = {objective: chosen.measured(each) for objective, each in shares.items()}
    for objective, each in shares.items():
        say(f"scoring for {objective}: {described(each)}, validation {_shown(validation[objective])}")
    if asked["objective"] not in shares:  # no image and text of the validation split share a class
        shares[asked["objective"]] = shares["pair"]
    spec = dataclasses.replace(chosen.scoring.spec, objective=asked["objective"], shares=shares, validation=validation)
    return Scoring(spec, tensors, multi_label)


def described(shares: Shares) -> str:
    """Return shares in words."""
    parts = [f"{getattr(shares, block):.3g} {block}" for block in BLOCKS if getattr(shares, block)]
    return " + ".join(parts) + (f", bank {shares.bank:g}" if shares.bank else "")


def _shown(measures: Mapping[Objective, float]) -> str:
    names: dict[Objective, str] = {"class": "MAP", "pair": "R@10"}
    return ", ".join(f"{names[k]} {v:.4f}" for k, v in measures.items() if k in names)
