"""Which picture and texts a report shows of each item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.data.reader import ShardReader
from cmgan_dist.retrieval.gallery import gallery_items
from tests.toy import index_tar, npy, picture, write_manifest, write_tar

Rows = list[tuple[str, int]]
"""Key and number of each sample of a shard."""


def data_set(folder: Path, shards: dict[str, Rows], features: bool = False) -> ShardReader:
    """A split "test" of raw samples, or of features; a sample's number is its picture, text and feature."""
    folder.mkdir()
    infos = []
    for name, rows in shards.items():
        members = []
        for key, number in rows:
            image = ("image.npy", npy(np.full(3, number, np.float32))) if features else ("png", picture(number))
            members += [(f"{key}.{image[0]}", image[1])]
            members += [(f"{key}.text.npy", npy(np.ones(2, np.float32)))] * features
            members += [(f"{key}.txt", f"text {number}".encode())] * (not features)
        write_tar(folder / name, members)
        infos.append(index_tar(folder / name))
    kinds = {"image": "features", "text": "features", "image_dim": 3, "text_dim": 2} if features else {}
    write_manifest(folder, {"test": infos}, label_kind="none", classes=[], **kinds)
    return ShardReader(str(folder), "test")


RAW: dict[str, Rows] = {"0.tar": [("a", 0), ("b", 1), ("a", 2), ("c", 3)], "1.tar": [("a", 4), ("b", 5), ("d", 6)]}


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (RAW, [0, 1, 2, 3, 4, 5, 6]),
        ({"0.tar": [("b", 1), ("a", 2), ("c", 3)], "1.tar": [("b", 5)]}, [1, None, 3, 5]),
        ({"9.tar": [("c", 3), ("d", 6), ("a", 4)]}, [3, 6, None]),
    ],
    ids=["keys begin anew in each shard", "samples left out", "shards cut anew"],
)
def test_features_are_shown_by_their_place(made: dict[str, Rows], shown: list[int | None], tmp_path: Path) -> None:
    """By a key alone where it is one sample's; what cannot be told is not shown."""
    data_set(tmp_path / "raw", RAW)
    items = gallery_items(data_set(tmp_path / "made", made, features=True), str(tmp_path / "raw"))
    assert [item.key for item in items] == [key for rows in made.values() for key, _ in rows]
    assert [item.image for item in items] == [None if n is None else picture(n) for n in shown]
    assert [item.texts for item in items] == [[] if n is None else [f"text {n}"] for n in shown]
