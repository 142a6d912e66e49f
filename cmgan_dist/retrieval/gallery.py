"""What people see of the items of a gallery: pictures and texts."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from cmgan_dist.data.origin import find_origin
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import Sample, parse_sample
from cmgan_dist.errors import BadSample

Place = tuple[str, int]
"""A shard's name, and the number of a sample in it."""
Way = tuple[str, int, str]
"""A shard's name or "", the number of a sample in it or -1, and its key."""


@dataclass
class GalleryItem:
    """A gallery item is one image with its texts, as they are shown; items stand in the order of the embeddings'
    images."""

    key: str
    image: bytes | None = None
    """Encoded JPEG, PNG or WebP; None for data of features."""
    texts: list[str] = field(default_factory=list)
    """In the order of the texts' rows; empty for data of features."""


def gallery_items(reader: ShardReader, pictures: str = "") -> list[GalleryItem]:
    """Return the picture and the texts of each sample of the reader's split, where it has some.

    Feature shards have none: they come from the raw shards in `pictures`, or from those that the features were written
    from when these are still there. Raises BadInput when `pictures` is given and is no data set, or is not given and
    another data set lies where the raw shards were."""
    source = pictures
    if not pictures and reader.manifest.image == "features":
        source = find_origin(reader.data, reader.manifest.details, "--pictures")
    raw = _RawSamples(ShardReader(source, reader.split), reader) if source else None
    items = []
    for place, sample in _samples(reader):
        sample = (raw and raw.of(place, sample.key)) or sample
        image = sample.image if isinstance(sample.image, bytes) else None
        texts = sample.texts if isinstance(sample.texts, list) else []
        items.append(GalleryItem(sample.key, image, texts))
    return items


def _places(reader: ShardReader) -> Iterator[tuple[int, Place]]:
    """Yield the number of the shard, and the place, of each sample in canonical order."""
    for number, shard in enumerate(reader.shards):
        for row in range(shard.samples):
            yield number, (shard.name, row)


def _samples(reader: ShardReader) -> Iterator[tuple[Place, Sample]]:
    """Yield each usable sample with its place, in canonical order."""
    for number, place in _places(reader):
        with contextlib.suppress(BadSample):
            yield place, reader.read(number, place[1])


class _RawSamples:
    """The samples of raw shards by their place, as keys may begin anew in each shard; where samples were left out, or
    shards cut anew, by a key that stands once in the shard, or once in the split."""

    def __init__(self, raw: ShardReader, features: ShardReader) -> None:
        """Read the split of `raw`, from which `features` was made."""
        counts = {shard.name: shard.samples for shard in features.shards}
        self._whole = {shard.name for shard in raw.shards if counts.get(shard.name) == shard.samples}
        self._found: dict[Way, list[Sample | None]] = defaultdict(list)
        for number, place in _places(raw):
            with contextlib.suppress(BadSample):
                key, members = raw.raw(number, place[1])
                sample = None
                with contextlib.suppress(BadSample):
                    sample = parse_sample(key, members, labelled=False)
                for way in self._ways(place, key):
                    self._found[way].append(sample)

    def _ways(self, place: Place, key: str) -> list[Way]:
        """Return by what a sample is known, the surest first."""
        shard, row = place
        return [(shard, row, key)] * (shard in self._whole) + [(shard, -1, key), ("", -1, key)]

    def of(self, place: Place, key: str) -> Sample | None:
        """Return the raw sample of one of features, None where it cannot be told or used."""
        known = next((self._found[way] for way in self._ways(place, key) if way in self._found), [])
        return known[0] if len(known) == 1 else None
