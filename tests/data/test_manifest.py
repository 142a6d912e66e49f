"""Manifests: what is not one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmgan_dist.data.manifest import Manifest, ShardInfo, load_manifest, natural_splits
from cmgan_dist.errors import BadInput


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 9, "name": "x"}'])
def test_bad_manifests_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        load_manifest(tmp_path)
    with pytest.raises(BadInput, match="has no split 'dev': its manifest has train"):
        Manifest("toy", "none", [], {"train": []}).shards("dev")


def test_a_manifest_there_and_back(tmp_path: Path) -> None:
    shards = {"train": [ShardInfo("train-000000.tar", 3, 10240, "a" * 64)], "val": []}
    manifest = Manifest("Grüße", "multi", ["a", "b"], shards, text="features", text_dim=5, details={"source": "toy"})
    (tmp_path / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    again = load_manifest(tmp_path)
    assert again == manifest
    assert (again.samples("train"), again.samples("val"), again.samples("test")) == (3, 0, 0)
    with pytest.raises(BadInput, match="split 'val' of Grüße has no samples"):
        again.shards("val")


def test_a_missing_folder_and_a_missing_manifest_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data folder .*none does not exist: pack one with 'python -m shards build'"):
        load_manifest(tmp_path / "none")
    with pytest.raises(BadInput, match=rf"{tmp_path} has no manifest\.json: write it with 'python -m shards index"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", [".packing", "train-000000.build.json", "train-000000.features.json"])
def test_an_unfinished_data_set_is_not_to_be_indexed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BadInput, match=r"is unfinished: start the same 'python -m shards build' \(or features\), all"):
        load_manifest(tmp_path)


def test_splits_are_in_the_order_that_a_reader_expects() -> None:
    assert natural_splits(["test", "extra", "val", "train", "dev"]) == ["train", "val", "test", "dev", "extra"]
