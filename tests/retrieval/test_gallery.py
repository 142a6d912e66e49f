"""Which picture and texts a report shows of each item."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.origin import origin_of
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.embed_source import open_source
from cmgan_dist.retrieval.gallery import gallery_items
from cmgan_dist.retrieval.pictures import open_pictures
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


@pytest.fixture
def made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardReader:
    """Features whose raw shards were named from another folder than the one where we are now, where a data set of the
    same names and keys lies at the same path."""
    for place, more in (("here", 0), ("there", 10)):
        (tmp_path / place).mkdir()
        data_set(tmp_path / place / "raw", {"0.tar": [("a", more), ("b", more + 1)]})
    monkeypatch.chdir(tmp_path / "here")
    features = data_set(tmp_path / "features", {"0.tar": [("a", 0), ("b", 1)]}, features=True)
    features.manifest.details = dict(origin_of("raw", load_manifest("raw")))
    (tmp_path / "features" / "manifest.json").write_text(features.manifest.to_json())
    monkeypatch.chdir(tmp_path / "there")
    return features


def test_pictures_are_those_of_the_data_set_that_features_were_made_from(made_elsewhere: ShardReader) -> None:
    assert [item.image for item in gallery_items(made_elsewhere)] == [picture(0), picture(1)]
    found = open_pictures("shards", made_elsewhere.data)
    assert found is not None
    assert found.read("0.tar", 1, "b") == picture(1)


def test_another_data_set_in_that_place_is_refused(made_elsewhere: ShardReader, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "here" / "raw")
    (tmp_path / "there" / "raw").rename(tmp_path / "here" / "raw")
    raw = str(tmp_path / "here" / "raw")
    with pytest.raises(BadInput, match=r"holds another data set now .* name its raw shards by --pictures"):
        gallery_items(made_elsewhere)
    assert [item.image for item in gallery_items(made_elsewhere, raw)] == [picture(10), picture(11)]
    with pytest.raises(BadInput, match=r"holds another data set now .* name its raw shards by --data"):
        open_pictures("shards", made_elsewhere.data)
    assert open_pictures("shards", made_elsewhere.data, raw) is not None


def test_a_data_set_that_was_never_told_is_none(
    made_elsewhere: ShardReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where a folder is called like the kind of source that a manifest names."""
    (tmp_path / "there" / "raw").rename(tmp_path / "there" / "index")
    made_elsewhere.manifest.details = {"source": "index"}
    assert {item.image for item in gallery_items(made_elsewhere)} == {None}
    assert not caplog.messages
    made_elsewhere.manifest.details = {"source": str(tmp_path / "here" / "raw")}
    assert {item.image for item in gallery_items(made_elsewhere)} == {None}
    assert "does not say which data set" in caplog.text


def test_raw_shards_that_are_gone_or_at_a_url_are_said(
    made_elsewhere: ShardReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "here" / "raw")
    assert {item.image for item in gallery_items(made_elsewhere)} == {None}
    assert "is not there any more, so its pictures are not shown: name the raw shards by --pictures" in caplog.text
    made_elsewhere.manifest.details = {"source": "s3://bucket/raw", "source_sha256": "0"}
    assert {item.image for item in gallery_items(made_elsewhere)} == {None}
    assert "made from s3://bucket/raw, which is a URL, which is not read unasked" in caplog.text


def test_features_of_features_lead_to_the_raw_shards(made_elsewhere: ShardReader, tmp_path: Path) -> None:
    again = data_set(tmp_path / "again", {"0.tar": [("a", 0), ("b", 1)]}, features=True)
    again.manifest.details = dict(origin_of(made_elsewhere.data, made_elsewhere.manifest))
    assert [item.image for item in gallery_items(again)] == [picture(0), picture(1)]


def test_an_index_knows_its_data_set_again(made_elsewhere: ShardReader, tmp_path: Path) -> None:
    raw = str(tmp_path / "here" / "raw")
    own = open_source("shards", raw, StreamConfig()).identity
    assert open_pictures(own.kind, own.location, sha256=own.sha256) is not None
    shutil.rmtree(raw)
    (tmp_path / "there" / "raw").rename(raw)
    with pytest.raises(BadInput, match=r"than the one that the index was made from .* by --data"):
        open_pictures(own.kind, own.location, sha256=own.sha256)
    assert open_pictures(own.kind, own.location, raw, own.sha256) is not None
