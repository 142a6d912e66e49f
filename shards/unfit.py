"""Texts that a text backbone is not made for: in a script whose words its tokeniser does not know, or too long."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.sample import parse_sample
from cmgan_dist.data.store import LocalStore, ShardStore
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadSample
from cmgan_dist.models.backbone import TextBackbone
from cmgan_dist.models.backbones import SentenceEncoder

LOOKED_AT = 2000
"""Texts of a data set that are looked at, as many of each shard until they are enough."""
MOST_UNFIT = 0.05
"""Share of the tokens that may be unknown, or cut off, without a word."""


@dataclass(frozen=True)
class Unfit:
    """What becomes of some texts."""

    unknown: float
    """Share of the tokens that stand for characters which the tokeniser does not know."""
    cut: float
    """Share of the tokens that lie behind the last one that the backbone takes."""
    cut_texts: float
    """Share of the texts that lose such tokens."""


def unfit(tokeniser: Any, texts: Sequence[str], most: int) -> Unfit:
    """Return what a tokeniser of transformers makes of one text or more, of which `most` tokens are taken."""
    ids = tokeniser(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    total = max(1, sum(map(len, ids)))
    room = most - tokeniser.num_special_tokens_to_add()
    behind = [max(0, len(each) - room) for each in ids]
    unknown = sum(each.count(tokeniser.unk_token_id) for each in ids) if tokeniser.unk_token_id is not None else 0
    return Unfit(unknown / total, sum(behind) / total, sum(map(bool, behind)) / len(ids))


def some_texts(data: ShardStore, shards: Sequence[ShardInfo]) -> list[str]:
    """Return up to LOOKED_AT texts, from the beginnings of shards that lie evenly over the data set, or of the first of
    a remote one, which is fetched whole."""
    chosen = shards[:: -(-len(shards) // 20)] if isinstance(data, LocalStore) else shards[:1]
    each = -(-LOOKED_AT // max(1, len(chosen)))
    return [text for shard in chosen for text in itertools.islice(_texts(data, shard), each)][:LOOKED_AT]


def _texts(data: ShardStore, shard: ShardInfo) -> Iterator[str]:
    with open(data.open(shard), "rb") as file:
        try:
            for key, _, members in iter_samples(file, shard.name):
                texts = parse_sample(key, members, labelled=False).texts
                yield from texts if isinstance(texts, list) else []
        except BadSample:  # whoever makes the features says so
            return


def warnings_of(backbone: TextBackbone | None, data: ShardStore, shards: Sequence[ShardInfo]) -> list[str]:
    """Return a line for each way in which the texts of a data set are not what a text backbone is made for."""
    if not isinstance(backbone, SentenceEncoder) or not hasattr(backbone.model.tokenizer, "num_special_tokens_to_add"):
        return []
    texts = some_texts(data, shards)
    if not texts:
        return []
    most = int(backbone.model.max_seq_length)
    found = unfit(backbone.model.tokenizer, texts, most)
    lines = []
    if found.unknown > MOST_UNFIT:
        lines.append(
            f"{found.unknown:.1%} of the tokens of {len(texts)} texts are unknown to the text backbone, which cannot "
            "tell them apart: name one for the language of the texts as --text-weights"
        )
    if found.cut > MOST_UNFIT:
        lines.append(
            f"{found.cut_texts:.1%} of {len(texts)} texts are longer than the {most} tokens that the text backbone "
            f"takes, and {found.cut:.1%} of their tokens are cut off: raise --max-tokens, if the model can, or "
            "give shorter texts"
        )
    return lines
