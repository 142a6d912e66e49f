"""What verify finds: every kind of fault, planted."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.data.tar import iter_samples
from shards.verify import verify
from tests.toy import build_folder, picture, re_sum, rewrite_tar, run_shards, shard_samples, write_members


def test_verify_is_clean_after_build(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_folder(raw, tmp_path / "out")
    capsys.readouterr()
    assert run_shards("verify", tmp_path / "out", "--processes", 1) == 0
    assert capsys.readouterr().out.endswith("52 samples in 7 shards, 0 problems, 0 warnings\n")


def cut(folder: Path) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def flip(folder: Path) -> None:
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"a train")] ^= 1
    path.write_bytes(data)


def orphan(folder: Path) -> None:
    rewrite_tar(folder / "train-000001.tar", {}, {"lonely.txt": b"a text"})
    re_sum(folder)


def no_text(folder: Path) -> None:
    name = next(iter(shard_samples(folder, "train-000001.tar")))
    rewrite_tar(folder / "train-000001.tar", {f"{name}.txt": None})
    re_sum(folder)


def corrupt_image(folder: Path) -> None:
    name = next(iter(shard_samples(folder, "train-000001.tar")))
    rewrite_tar(folder / "train-000001.tar", {f"{name}.png": picture(1)[:60]})
    re_sum(folder)


def label_out_of_range(folder: Path) -> None:
    name = next(iter(shard_samples(folder, "train-000001.tar")))
    rewrite_tar(folder / "train-000001.tar", {f"{name}.json": b'{"label": 7}'})
    re_sum(folder)


def label_missing(folder: Path) -> None:
    name = next(iter(shard_samples(folder, "train-000001.tar")))
    rewrite_tar(folder / "train-000001.tar", {f"{name}.json": None})
    re_sum(folder)


def _first_image(folder: Path) -> bytes:
    with open(folder / "test-000000.tar", "rb") as file:
        return next(iter_samples(file, "test"))[2]["png"]


def same_image(folder: Path) -> None:
    extra = {"copy.png": _first_image(folder), "copy.txt": b"a copy", "copy.json": b'{"label": 0}'}
    rewrite_tar(folder / "train-000001.tar", {}, extra)
    re_sum(folder)


def same_key(folder: Path) -> None:
    key = next(iter(shard_samples(folder, "test-000000.tar")))
    rewrite_tar(
        folder / "train-000001.tar", {}, {f"{key}.png": picture(9), f"{key}.txt": b"x", f"{key}.json": b'{"label": 0}'}
    )
    re_sum(folder)


def features_among_images(folder: Path) -> None:
    out = io.BytesIO()
    np.save(out, np.ones(5, np.float32))
    rewrite_tar(
        folder / "train-000001.tar", {}, {"f.image.npy": out.getvalue(), "f.txt": b"x", "f.json": b'{"label": 0}'}
    )
    re_sum(folder)


def wrong_count(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 8', '"samples": 9', 1))


def old_sidecar(folder: Path) -> None:
    shutil.copy(folder / "train-000000.index.npz", folder / "train-000001.index.npz")


def broken_sidecar(folder: Path) -> None:
    (folder / "train-000001.index.npz").write_bytes(b"PK nonsense")


def lost_sidecar(folder: Path) -> None:
    (folder / "train-000001.index.npz").unlink()


def lost_shard(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def stray_shard(folder: Path) -> None:
    shutil.copy(folder / "train-000001.tar", folder / "train-000009.tar")


def unfinished(folder: Path) -> None:
    (folder / ".train-000001.tar.1.tmp").write_bytes(b"half")


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (cut, "train-000001.tar is truncated at byte 3000"),
        (flip, "train-000001.tar has another checksum"),
        (orphan, "orphan member lonely.txt: has no image"),
        (no_text, "has no text"),
        (corrupt_image, "the image does not decode"),
        (label_out_of_range, "label 7 is out of range, there are 2 classes"),
        (label_missing, "has no label"),
        (same_image, "the same image across splits"),
        (features_among_images, "its image is features of size 5, the manifest says not features"),
        (wrong_count, "train-000000.tar has 8 samples, the manifest says 9"),
        (old_sidecar, "train-000001.index.npz does not agree"),
        (broken_sidecar, "train-000001.index.npz is not a shard index"),
        (lost_sidecar, "train-000001.index.npz is missing"),
        (lost_shard, "train-000001.tar is in the manifest but not in the folder"),
        (stray_shard, "train-000009.tar is in the folder but not in the manifest"),
        (unfinished, "is left from a run that did not end"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_finds_each_planted_fault(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], plant, expected: str
) -> None:
    build_folder(raw, tmp_path / "out")
    plant(tmp_path / "out")
    capsys.readouterr()
    assert run_shards("verify", tmp_path / "out", "--processes", 1) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert any(expected in line for line in problems), problems


def test_a_duplicate_within_a_split_is_a_warning(raw: Path, tmp_path: Path) -> None:
    shutil.copy(raw / "train/cat/train00.png", raw / "train/cat/train01.png")
    build_folder(raw, tmp_path / "out")
    report = verify(tmp_path / "out", processes=1)
    assert report.problems == []
    assert len(report.warnings) == 1
    assert "the same image within a split: train/cat/train0" in report.warnings[0]


def test_texts_that_stand_in_two_splits_are_a_warning(raw: Path, tmp_path: Path) -> None:
    build_folder(raw, tmp_path / "out")
    path = next((tmp_path / "out").glob("test-*.tar"))
    key = next(iter(shard_samples(tmp_path / "out", path.name)))
    other, ((text, *_), _) = next(iter(shard_samples(tmp_path / "out", "train-000000.tar").items()))
    rewrite_tar(path, {f"{key}.txt": f"  {str(text).upper()} !\n".encode()})
    re_sum(tmp_path / "out")
    report = verify(tmp_path / "out", processes=1)
    assert report.problems == []
    (line,) = report.warnings
    assert line.startswith("1 samples of split 'test' have a text that split 'train' has too, but for case and")
    assert f"the first is {key}, as {other}:" in line


def test_equal_keys_in_two_splits_are_no_problem(raw: Path, tmp_path: Path) -> None:
    """As tools write them that begin anew in each shard, or in each output."""
    build_folder(raw, tmp_path / "out")
    same_key(tmp_path / "out")
    report = verify(tmp_path / "out", processes=1)
    assert not report.problems
    assert [line for line in report.warnings if line.startswith("the same key across splits: ")]


def test_of_keys_and_images_that_are_repeated_everywhere_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    """As of tools whose keys begin anew in each shard."""
    for shard in range(7):
        members = {f"{i}.{kind}": data for i in range(14) for kind, data in (("png", picture(i)), ("txt", b"%d" % i))}
        write_members(tmp_path / f"train-{shard}.tar", members)
    run_shards("index", tmp_path, "--processes", 1)
    warnings = verify(tmp_path, processes=1).warnings
    for what in ("key", "image"):
        lines = [line for line in warnings if line.startswith(f"the same {what} within a split: ")]
        assert lines[0].endswith(f": {', '.join(f'0 (train, train-{shard}.tar)' for shard in range(5))} and 2 more")
        assert len(lines) == 11
        assert lines[-1].endswith(f": 14 {what}s in 98 samples, of which the first 10 are named")
    assert len(warnings) == 22
