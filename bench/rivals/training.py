"""Features in, a trained rival out: one loop, one search and one way to measure for all of them.

Validation alone chooses the settings, when training stops, and how two items are compared. Shapes: N images, M texts.
"""

from __future__ import annotations

import copy
import random
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.rivals.methods import Method, Rival, Settings
from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.batch import eval_batches
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.metrics import Embeddings, evaluate

Way = Literal["cosine", "zscore", "posteriors"]
"""How two items are compared: cosine, cosine of z-scores, inner product of class posteriors."""
CHECKS = 20
"""Times that a whole training measures itself on the validation split."""
PATIENCE = 5
"""Checks without a better score after which training ends."""


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


# ---------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Data:
    """Data are the features of the three splits as they are stored, and standardised by the training split."""

    name: str
    raw: dict[str, Embeddings]
    """Split -> features."""
    scaled: dict[str, Embeddings]
    """Split -> features, each dimension with mean 0 and deviation 1 over the training split."""

    @property
    def classes(self) -> int:
        """Return C, 0 without labels."""
        labels = self.raw["train"].labels
        return 0 if labels is None else labels.shape[1]


def read_split(folder: Path, split: str) -> Embeddings:
    """Return a split's features: float32 [N, F_i] and [M, F_t]. Raises BadInput when they are not features."""
    reader = ShardReader(str(folder), split, StreamConfig())
    if reader.manifest.image_dim is None or reader.manifest.text_dim is None:
        raise BadInput(f"--data {folder} holds raw pairs: make features of them by 'python -m shards features'")
    images, texts, owners, labels, count = [], [], [], [], 0
    for batch in eval_batches(reader, image_size=1, batch=512):
        assert isinstance(batch.text, Tensor)
        images.append(batch.image)
        texts.append(batch.text)
        owners.append(batch.owner + count)
        labels += [] if batch.labels is None else [batch.labels]
        count += len(batch.image)
    return Embeddings(torch.cat(images), torch.cat(texts), torch.cat(owners), torch.cat(labels) if labels else None)


def read_data(folder: Path) -> Data:
    """Return the train, val and test splits of a folder of shards of features."""
    name = ShardReader(str(folder), "train", StreamConfig()).manifest.name
    raw = {split: read_split(folder, split) for split in ("train", "val", "test")}
    moments = [(x.mean(0), x.std(0).clamp_min(1e-6)) for x in (raw["train"].image, raw["train"].text)]

    def scaled(data: Embeddings) -> Embeddings:
        image, text = ((x - m) / s for x, (m, s) in zip((data.image, data.text), moments, strict=True))
        return replace(data, image=image, text=text)

    return Data(name, raw, {split: scaled(data) for split, data in raw.items()})


def batches(data: Embeddings, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield an epoch: every image once, in random order, with one of its texts drawn at random.

    A batch is image [B, F_i], text [B, F_t] and labels [B, C] or None; the last one is left out where it is smaller."""
    captions = torch.bincount(data.text_owner, minlength=len(data.image))
    by_owner, first = data.text_owner.argsort(stable=True), captions.cumsum(0) - captions
    drawn = (torch.rand(len(captions), generator=generator) * captions).long()
    order = torch.randperm(len(captions), generator=generator)
    order = order[captions[order] > 0]
    size = min(size, len(order))
    for rows in order.split(size):
        if len(rows) == size:
            text = by_owner[first[rows] + drawn[rows]]
            yield data.image[rows], data.text[text], None if data.labels is None else data.labels[rows]


# ---------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def embed(model: Rival, data: Embeddings) -> dict[Way, Embeddings]:
    """Return what a rival makes of features, by each way in which it can be compared."""
    model.eval()
    u, v = model(data.image, data.text)
    plain = Embeddings(u, v, data.text_owner, data.labels)
    made: dict[Way, Embeddings] = {"cosine": plain, "zscore": plain}
    image, text = model.posteriors(u), model.posteriors(v)
    if image is not None and text is not None:
        made["posteriors"] = replace(plain, image=image, text=text)
    model.train()
    return made


def measure(made: dict[Way, Embeddings], way: Way) -> dict[str, Any]:
    """Return `metrics.evaluate` of a set by one way to compare."""
    return evaluate(made[way], "inner" if way == "posteriors" else way, all_modal=False)


def validation_score(metrics: dict[str, Any], labelled: bool) -> float:
    """Return MAP for a method that learns classes, the mean R@10 of both directions for one that learns pairs."""
    if labelled:
        return float(metrics["map/mean"])
    return float(metrics["recall/image_to_text@10"] + metrics["recall/text_to_image@10"]) / 2


# ---------------------------------------------------------------------------------------------- training


@dataclass
class Fitted:
    """A trained rival at its best check."""

    model: Rival
    way: Way
    score: float
    """On the validation split."""
    seconds: float
    """Processor time of the training with its checks."""


def fit(method: Method, settings: Settings, data: Data, seed: int, epochs: int) -> Fitted:
    """Train a rival for at most `epochs` with AdamW and a cosine schedule; return it as validation liked it best.

    Raises BadInput when no check gave a score, because its values were not finite."""
    began = processor_seconds()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, val = data.scaled["train"], data.scaled["val"]
    if not method.labelled:
        val = replace(val, labels=None)  # MAP would be measured for nothing
    model = method.build((train.image.shape[1], train.text.shape[1], data.classes), settings)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings["decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    every, best, state, waited = max(1, epochs // CHECKS), Fitted(model, "cosine", -1.0, 0.0), {}, 0
    for epoch in range(1, epochs + 1):
        for image, text, labels in batches(train, int(settings["batch"]), generator):
            loss = model.loss(image, text, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch % every and epoch < epochs:
            continue
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            break
        made, waited = embed(model, val), waited + 1
        for way in made:
            score = validation_score(measure(made, way), method.labelled)
            if score > best.score:
                best, state, waited = Fitted(model, way, score, 0.0), copy.deepcopy(model.state_dict()), 0
        if waited >= PATIENCE:
            break
    if not state:
        raise BadInput(f"no check was finite with the settings {dict(settings)}: lower the rates of the space")
    model.load_state_dict(state)
    return replace(best, seconds=processor_seconds() - began)


def draws(method: Method, tries: int, seed: int = 0) -> list[dict[str, float]]:
    """Return `tries` settings of a method: the first value of each, then random ones, of which one may come twice. They
    are the same for the same seed."""
    rng, space = random.Random(seed), method.space
    first = {name: values[0] for name, values in space.items()}
    return [first, *({name: rng.choice(values) for name, values in space.items()} for _ in range(tries - 1))]


def search(
    method: Method, data: Data, tries: int, epochs: int, say: Callable[[str], None]
) -> tuple[dict[str, float], float]:
    """Return the settings of `tries` that validation likes best, and their score."""
    best: tuple[float, dict[str, float]] = (-1.0, {})
    for settings in draws(method, tries):
        fitted = fit(method, settings, data, 0, epochs)
        say(f"  {fitted.score:.4f} by {fitted.way}, {fitted.seconds:.1f} s: {settings}")
        if fitted.score > best[0]:
            best = fitted.score, settings
    return best[1], best[0]
