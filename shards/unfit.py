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
from cmgan_dist.models.clip import MARKS, ClipTextBackbone

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


def unfit(ids: Sequence[list[int]], unknown_id: int | None, room: int) -> Unfit:
    """Return what becomes of the tokens of one text or more, of which `room` are taken."""
    total = max(1, sum(map(len, ids)))
    behind = [max(0, len(each) - room) for each in ids]
    unknown = sum(each.count(unknown_id) for each in ids) if unknown_id is not None else 0
    return Unfit(unknown / total, sum(behind) / total, sum(map(bool, behind)) / len(ids))


def unfit_for(backbone: TextBackbone, texts: Sequence[str]) -> tuple[Unfit, int] | None:
    """Return what a backbone makes of one text or more, and how many tokens of a text it takes, its marks with them.

    None where its tokens are not known."""
    if isinstance(backbone, ClipTextBackbone):
        tokeniser, most = backbone.tokeniser, int(backbone.tokeniser.context_length)
        if hasattr(tokeniser, "encode"):  # open_clip's own: of bytes, so that none is unknown
            return unfit([tokeniser.encode(text) for text in texts], None, most - MARKS), most
        clean = getattr(tokeniser, "clean_fn", str)
        return _unfit_for(tokeniser.tokenizer, [clean(text) for text in texts], most), most
    if isinstance(backbone, SentenceEncoder) and hasattr(backbone.model.tokenizer, "num_special_tokens_to_add"):
        most = int(backbone.model.max_seq_length)
        return _unfit_for(backbone.model.tokenizer, texts, most), most
    return None


def _unfit_for(tokeniser: Any, texts: Sequence[str], most: int) -> Unfit:
    """Return what a tokeniser of transformers makes of texts, of which `most` tokens are taken."""
    ids = tokeniser(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return unfit(ids, tokeniser.unk_token_id, most - tokeniser.num_special_tokens_to_add())


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
    if not isinstance(backbone, ClipTextBackbone | SentenceEncoder):
        return []
    texts = some_texts(data, shards)
    told = unfit_for(backbone, texts) if texts else None
    if told is None:
        return []
    found, most = told
    lines = []
    if found.unknown > MOST_UNFIT:
        lines.append(
            f"{found.unknown:.1%} of the tokens of {len(texts)} texts are unknown to the text backbone, which cannot "
            "tell them apart: name one for the language of the texts as --text-weights"
        )
    if found.cut > MOST_UNFIT:
        ways = "raise --max-tokens, if the model can, or give shorter texts"
        if isinstance(backbone, ClipTextBackbone):
            more = f"raise --max-tokens, the model takes {backbone.context}, or " * (most < backbone.context)
            ways = f"{more}give shorter texts"
        lines.append(
            f"{found.cut_texts:.1%} of {len(texts)} texts are longer than the {most} tokens that the text backbone "
            f"takes, and {found.cut:.1%} of their tokens are cut off: {ways}"
        )
    return lines
