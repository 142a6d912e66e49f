"""What people see of the items of a gallery: pictures and texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cmgan_dist.data.manifest import MANIFEST_NAME
from cmgan_dist.data.reader import ShardReader


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

    Feature shards have none: they come by key from the raw shards in `pictures`, or from those that the features were
    written from when these are still there. Raises BadInput when `pictures` is given and is no data set."""
    source = pictures or str(reader.manifest.details.get("source", ""))
    raw = {}
    if pictures or (reader.manifest.image == "features" and (Path(source) / MANIFEST_NAME).is_file()):
        raw = {sample.key: sample for sample in ShardReader(source, reader.split)}
    items = []
    for sample in reader:
        sample = raw.get(sample.key, sample)
        image = sample.image if isinstance(sample.image, bytes) else None
        texts = sample.texts if isinstance(sample.texts, list) else []
        items.append(GalleryItem(sample.key, image, texts))
    return items
