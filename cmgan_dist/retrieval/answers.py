"""What a search is asked and answers, as plain values: checks of what came, hits as JSON, scores against chance.

A `Searcher` answers one question at a time; threads, bounds and HTTP are those of ``serve.py``. E is the dimension of
the common space."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.retrieval.chance import above_chance, is_near
from cmgan_dist.retrieval.index_items import chosen_classes
from cmgan_dist.retrieval.pictures import Pictures, PicturesOf, thumbnail
from cmgan_dist.retrieval.upload_decoder import Decoded

T = TypeVar("T")
Wanted = Literal["image", "text", "any", "each"]
"""Items of one modality, the best of both, or as many of each."""

MOST_CHARACTERS = 2000
"""Of a text that is searched with."""
REMEMBERED = 500
"""Texts, and pictures, that were searched with and whose vectors are kept."""


class NotThere(BadInput):
    """What is asked for by its name is not there."""


@dataclass(frozen=True)
class Ask:
    """How many hits of what kind a search shall find."""

    k: int
    modality: Wanted
    classes: tuple[str, ...]
    """Names, or several with commas between, as `chosen_classes` takes them."""


def checked_text(text: str) -> str:
    """Return a text to search with. Raises BadInput when it is empty or too long."""
    if not text.strip():
        raise BadInput("text is empty: give some words")
    if len(text) > MOST_CHARACTERS:
        raise BadInput(f"text has {len(text)} characters: give at most {MOST_CHARACTERS}")
    return text.strip()


def hit_record(
    hit: Any, chance: tuple[float, float], pictures: Pictures | None, shown: int | None, *, scored: bool = True
) -> dict[str, Any]:
    """Return an `Index` hit as JSON.

    `pictures`: where its picture lies, None where it is not there. `shown`: the item whose thumbnail shows the hit,
    None without one. "texts" are what a picture's sample says of it. `scored`: False for hits of no search."""
    texts = list(hit.texts)
    if pictures is not None and pictures.local and not texts:
        texts = pictures.texts(hit.shard, hit.row, hit.key)
    record = {"id": hit.id, "modality": hit.modality, "key": hit.key, "texts": texts, "labels": list(hit.labels)}
    record |= {"picture": None if pictures is None else shown, "shard": hit.shard, "row": hit.row}
    if scored:
        record |= {"score": hit.score, "above_chance": above_chance(hit.score, chance)}
    return record


class Searcher:
    """An index with the model that encodes queries and, where they are there, the raw pictures. One thread at a time
    may search; `thumbnail` may be called by others."""

    def __init__(self, index: Any, model: Any, pictures_of: PicturesOf) -> None:
        """`index`: an `Index`. `model`: what has encode_texts and encode_images, as `Model`."""
        self.index, self.model, self.pictures_of = index, model, pictures_of
        mean, deviation = index.chance
        self.chance = (float(mean), float(deviation))
        self.counts = {modality: len(index.items.allowed(modality, None)) for modality in ("image", "text")}
        self._texts: OrderedDict[str, np.ndarray] = OrderedDict()
        self._queries: OrderedDict[str, tuple[np.ndarray, bytes]] = OrderedDict()
        """Token -> (vector, thumbnail) of a picture that was searched with."""

    def over(self, index: Any, pictures_of: PicturesOf) -> Searcher:
        """Return what searches another index of the same model, and knows the queries that this one knows."""
        made = Searcher(index, self.model, pictures_of)
        made._texts, made._queries = self._texts, self._queries
        return made

    def find_text(self, text: str, ask: Ask) -> dict[str, Any]:
        """Return the answer to a search by text."""
        if text not in self._texts:
            _remember(self._texts, text, self.model.encode_texts([text])[0])
        return self._find(self._texts[text], ask, {"text": text})

    def find_upload(self, token: str, upload: Decoded, ask: Ask) -> dict[str, Any]:
        """Return the answer to a search by a picture that was uploaded; `find_known` knows it by the token then."""
        _remember(self._queries, token, (self.model.encode_images([upload.square])[0], upload.thumbnail))
        return self.find_known(token, ask)

    def find_known(self, token: str, ask: Ask) -> dict[str, Any]:
        """Return the answer to a search by a picture that was given before. Raises NotThere as `known_query`."""
        return self._find(self.known_query(token)[0], ask, {"picture": token})

    def known_query(self, token: str) -> tuple[np.ndarray, bytes]:
        """Return (vector, thumbnail) of a picture that was searched with. Raises NotThere when it is not kept."""
        if token not in self._queries:
            raise NotThere("the server does not know this picture any more: give it again")
        self._queries.move_to_end(token)
        return self._queries[token]

    def find_similar(self, id: int, ask: Ask) -> dict[str, Any]:
        """Return what lies near an item, which comes as the query. Raises NotThere when there is no such item."""
        query = {"item": self._record(self._hit(id), scored=False)}
        return self._find(np.asarray(self.index.vector(id), np.float32), ask, query, without=id)

    def listed(self, offset: int, limit: int, modality: str | None, classes: tuple[str, ...]) -> dict[str, Any]:
        """Return the items offset..offset+limit of those that fit, in the order of their ids."""
        chosen = chosen_classes(classes, self.index.classes)
        ids = self.index.items.allowed(modality, chosen and tuple(chosen))
        hits = [self.index.get(int(id)) for id in ids[offset : offset + limit]]
        records = [self._record(hit, scored=False) for hit in hits]
        return {"hits": records, "offset": offset, "total": len(ids)}

    def thumbnail(self, id: int, side: int) -> bytes:
        """Return the small JPEG of an item. Raises NotThere where there is no such item, or no picture of it."""
        hit, pictures = self._hit(id), self.pictures_of(id)
        try:
            if pictures is None or not pictures.are_there():
                raise BadSample("the raw data are not here")
            return thumbnail(pictures.read(hit.shard, hit.row, hit.key), side)
        except BadSample as error:
            raise NotThere(f"item {id} has no picture to show: {error}") from None

    def _hit(self, id: int) -> Any:
        try:
            return self.index.get(id)
        except BadInput:
            raise NotThere(f"item {id} is not in the index: browse for those that are") from None

    def _record(self, hit: Any, *, scored: bool = True) -> dict[str, Any]:
        pictures = self.pictures_of(hit.id)
        there = pictures if pictures is not None and pictures.are_there() else None
        owner = hit.id if hit.modality == "image" else hit.owner  # which may have been removed from the index
        return hit_record(hit, self.chance, there, owner if self._holds(owner) else None, scored=scored)

    def _holds(self, id: int) -> bool:
        ids = self.index.items.ids
        at = int(np.searchsorted(ids, id))
        return at < len(ids) and int(ids[at]) == id

    def _find(self, vector: np.ndarray, ask: Ask, query: dict[str, Any], without: int = -1) -> dict[str, Any]:
        """Return the answer to a search by `vector`, float32 [E], but for the item `without`."""
        classes = chosen_classes(ask.classes, self.index.classes)
        modalities = {"each": ("image", "text"), "any": (None,)}.get(ask.modality, (ask.modality,))
        hits = []
        for modality in modalities:
            found = self.index.search(vector[None], ask.k + (without >= 0), modality=modality, classes=classes)[0]
            hits += [hit for hit in found if hit.id != without][: ask.k]
        records = [self._record(hit) for hit in hits]
        return {"query": query, "hits": records, "near": is_near(hits, self.index.near)}


def _remember(kept: OrderedDict[str, T], key: str, value: T) -> None:
    """Keep a value, and the newest REMEMBERED only."""
    kept[key] = value
    while len(kept) > REMEMBERED:
        kept.popitem(last=False)
