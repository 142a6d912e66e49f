"""Splits that are drawn from the training split: whole groups, the same for the same data, nothing lost."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from shards.__main__ import main
from shards.shard_file import distinct
from shards.split import SplitCommand, drawn, grouped, split, unlike
from shards.verify import verify
from tests.toy import picture, run_shards, write_members


def test_groups_are_the_connected_components() -> None:
    """Against a naive closure over all pairs."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        digests = [[bytes([d]) for d in rng.integers(40, size=rng.integers(1, 4))] for _ in range(30)]
        naive = [{i} for i in range(30)]
        for i, j in itertools.combinations(range(30), 2):
            if set(digests[i]) & set(digests[j]) and naive[i] is not naive[j]:
                joined = naive[i] | naive[j]
                for k in joined:
                    naive[k] = joined
        assert {frozenset(group) for group in grouped(digests)} == {frozenset(group) for group in naive}


def test_whole_groups_are_drawn_and_never_more_than_the_share() -> None:
    groups = [[0, 1, 2, 3, 4, 5], [6], [7, 8], [9], [10, 11], [12], [13], [14], [15], [16], [17], [18], [19]]
    out = drawn([f"k{i}" for i in range(20)], groups, {"val": 0.25, "test": 0.1})
    assert (len(out["val"]), len(out["test"])) == (5, 2)
    assert not set(out["val"]) & set(out["test"])
    for group in groups:
        assert len({name for name, taken in out.items() for i in group if i in taken} | set()) <= 1
        assert all((set(group) <= set(taken)) or not (set(group) & set(taken)) for taken in out.values())
    with pytest.raises(BadInput, match="--together images"):
        drawn(["a", "b"], [[0, 1]], {"val": 0.5})


def everything(folder: Path) -> dict[str, tuple[str, bytes, list[str] | bytes, tuple[int, ...]]]:
    """Key -> split, picture or feature, texts and labels of every sample."""
    out = {}
    for name in load_manifest(folder).splits:
        for sample in ShardReader(str(folder), name):
            image = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
            texts = sample.texts if isinstance(sample.texts, list) else sample.texts.tobytes()
            out[sample.key] = (name, image, texts, tuple(sample.labels))
    return out


@pytest.mark.parametrize("kind", ["raw", "features"])
def test_nothing_is_lost_and_nothing_equal_lies_on_both_sides(
    kind: str, raw_data: Callable[..., Path], feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    counts = {"train": 60, "test": 8}
    data = raw_data(counts=counts) if kind == "raw" else feature_data(splits={"train": [30, 30], "test": [8]})
    together = "images" if kind == "raw" else "images-and-texts"  # the toy's captions are few
    made = [
        split(SplitCommand(str(data), str(tmp_path / f"out{n}"), val=0.2, together=together, processes=n))  # type: ignore[arg-type]
        for n in (1, 2)
    ]
    assert made[0].to_json() == made[1].to_json()
    assert {name: made[0].samples(name) for name in made[0].splits} == {"train": 48, "test": 8, "val": 12}
    before, after = everything(data), everything(tmp_path / "out1")
    assert {k: v[1:] for k, v in before.items()} == {k: v[1:] for k, v in after.items()}
    assert all(after[k][0] in ((v[0], "val") if v[0] == "train" else (v[0],)) for k, v in before.items())
    assert not verify(tmp_path / "out1", processes=1).problems


def test_samples_with_equal_texts_stay_together(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data = feature_data(splits={"train": [40]}, captions=1)
    samples = everything(data)
    split(SplitCommand(str(data), str(tmp_path / "out"), val=0.3, processes=1))
    sides: dict[object, set[str]] = {}
    for name, _, texts, _ in everything(tmp_path / "out").values():
        sides.setdefault(texts, set()).add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert len(samples) == 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val": 0.0}, "give one of them a share"),
        ({"val": 1.5}, "must be shares"),
        ({"test": 0.1}, "there is a split 'test' already"),
        ({"output": "data"}, "is the data set itself"),
        ({"shard_samples": 0}, "--shard-samples is 0"),
    ],
)
def test_what_cannot_be_is_said(
    options: dict[str, Any], said: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = feature_data(splits={"train": [30], "test": [6]})
    chosen = {"output": str(tmp_path / "out"), **options}
    chosen["output"] = str(data) if chosen["output"] == "data" else chosen["output"]
    with pytest.raises(BadInput, match=said):
        split(SplitCommand(str(data), **chosen))


def test_the_way_that_a_missing_split_names_leads_out(
    feature_data: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = feature_data(splits={"train": [30]})
    with pytest.raises(BadInput, match=r"shards split DIR --val 0\.1 --output NEW"):
        load_manifest(data).shards("val")
    main(["split", str(data), "--val", "0.1", "--output", str(tmp_path / "new"), "--processes", "1"])
    assert "wrote" in capsys.readouterr().out
    assert load_manifest(tmp_path / "new").samples("val") == 3
    main(["index", str(data), "--overwrite"])
    assert f"python -m shards split {data} --val 0.1 --output NEW" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"0.json": b'{"texts": 5}'}, '"texts" must be'),
        ({"0.text.npy": b""}, "not a readable"),
        ({"0.json": b"["}, "not JSON"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(bad: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    members = {name: data for i in range(4) for name, data in ((f"{i}.png", picture(i)), (f"{i}.txt", b"text %d" % i))}
    write_members(tmp_path / "data/train-0.tar", dict(sorted((members | bad).items())))
    run_shards("index", tmp_path / "data", "--processes", 1)
    with pytest.raises(BadInput, match=rf"train-0\.tar sample 0: .*{reason}.*shards verify {tmp_path}/data'"):
        split(SplitCommand(str(tmp_path / "data"), str(tmp_path / "out"), val=0.5, processes=1))


@pytest.mark.parametrize("name", ["train-000000.tar", "test-000000.tar"])
@pytest.mark.parametrize("how", ["bytes", "samples", "count"])
def test_a_shard_that_is_not_what_its_manifest_says_stops_it(
    name: str, how: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = feature_data(splits={"train": [20], "test": [8]})
    said = f"{name} is not what its manifest says: mend or remove what 'python -m shards verify"
    tar = (data / name).read_bytes()
    if how == "bytes":
        (data / name).write_bytes(tar[:515] + bytes([tar[515] ^ 64]) + tar[516:])
    elif how == "samples":
        with tarfile.open(data / name) as old:
            kept = [(member.name, old.extractfile(member).read()) for member in old.getmembers()[:-6]]  # type: ignore[union-attr]
        write_members(data / name, dict(kept))
    else:
        manifest = load_manifest(data)
        manifest.splits = {k: [replace(s, samples=s.samples + 1) for s in v] for k, v in manifest.splits.items()}
        (data / "manifest.json").write_text(manifest.to_json())
        said = r"has (20|8) samples, its manifest says (21|9): write the manifest anew"
    with pytest.raises(BadInput, match=said):
        split(SplitCommand(str(data), str(tmp_path / "out"), val=0.2, processes=1))
    assert not (tmp_path / "out/manifest.json").exists()


def test_keys_that_begin_anew_in_each_tar_lose_nothing(tmp_path: Path) -> None:
    """As ``webdataset.TarWriter`` is often used; by the key alone, val would be the same few of every tar."""
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(6):
        names = {i: f"{i:04d}" for i in range(20)}
        members = {f"{name}.png": picture(20 * shard + i) for i, name in names.items()}
        texts = {f"{name}.txt": b"text number %d" % (20 * shard + i) for i, name in names.items()}
        write_members(data / f"{shard:05d}.tar", dict(sorted((members | texts).items())))
    run_shards("index", data, "--processes", 1, "--no-decode")
    made = split(SplitCommand(str(data), str(tmp_path / "out"), val=0.2, processes=1))
    assert {name: made.samples(name) for name in made.splits} == {"train": 96, "val": 24}
    val = list(ShardReader(str(tmp_path / "out"), "val"))
    texts_of = [sample.texts[0] for name in made.splits for sample in ShardReader(str(tmp_path / "out"), name)]
    assert sorted(texts_of) == sorted(f"text number {i}" for i in range(120))
    assert len({sample.key for sample in val}) == 24
    assert len({sample.key[:4] for sample in val}) > 24 // 6 + 4


def test_a_key_is_drawn_by_alone_where_no_other_is_equal() -> None:
    keys = unlike(["a", "b", "a"], [("x.tar", 0), ("x.tar", 1), ("y.tar", 0)])
    assert keys[1] == "b"
    assert len(set(keys)) == 3


def test_equal_keys_get_a_number() -> None:
    taken = dict[str, int]()
    found = [distinct(key, taken) for key in ("a", "a", "b", "a-3", "a", "a", "a-3")]
    assert found == ["a", "a-2", "b", "a-3", "a-4", "a-5", "a-3-2"]
