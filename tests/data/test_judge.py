"""What is a sample, and which one its data set can use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cmgan_dist.data import tar as tar_module
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import MOST_JSON_BYTES, MOST_NUMBERS, MOST_TEXT_BYTES, parse_array, parse_sample
from cmgan_dist.data.tar import iter_groups, members_of
from cmgan_dist.errors import BadSample
from tests.toy import index_tar, npy, write_manifest, write_tar

PAIR = [("a.jpg", b"x"), ("a.txt", b"a dog")]


def groups_of(folder: Path, *members: tuple[str, bytes]) -> tuple[list[list[str]], list[str]]:
    """(names of the members of each sample, names of files that belong to none)."""
    write_tar(folder / "t.tar", list(members))
    foreign: list[str] = []
    found = list(iter_groups(io.BytesIO((folder / "t.tar").read_bytes()), "t.tar", foreign))
    return [[member.name for member in group] for group in found], foreign


@pytest.mark.parametrize(
    "name",
    [
        "._a.jpg",
        ".DS_Store",
        ".git/a.json",
        "__MACOSX/a.jpg",
        "README.md",
        "README.txt",
        "sub/LICENSE.txt",
        "notes",
        "b.mp3",
        "x/.ipynb_checkpoints/a.txt",
    ],
)
def test_a_foreign_file_is_no_sample_wherever_it_stands(tmp_path: Path, name: str) -> None:
    for place in range(3):
        members = [*PAIR, ("b.jpg", b"x"), ("b.txt", b"x")]
        if name == "b.mp3" and place > 1:
            continue
        members.insert(place, (name, b"?"))
        found, foreign = groups_of(tmp_path, *members)
        assert found == [["a.jpg", "a.txt"], ["b.jpg", "b.txt"]]
        assert len(foreign) == 1


def test_what_is_ignored_stays_with_its_sample(tmp_path: Path) -> None:
    found, foreign = groups_of(tmp_path, ("a.cls", b"3"), *PAIR, ("a.xml", b"?"), ("./b.jpg", b"x"), ("./b.txt", b"x"))
    assert found == [["a.cls", "a.jpg", "a.txt", "a.xml"], ["./b.jpg", "./b.txt"]]
    assert foreign == []
    assert groups_of(tmp_path, ("license.jpg", b"x"), ("license.txt", b"x"))[0] == [["license.jpg", "license.txt"]]


def test_samples_between_foreign_files_are_read(tmp_path: Path) -> None:
    pair = [("._a.jpg", b"?"), PAIR[0], ("._a.txt", b"?"), PAIR[1], ("README", b"?"), ("b.png", b"y"), ("b.txt", b"b")]
    write_tar(tmp_path / "train.tar", pair)
    write_manifest(tmp_path, {"train": [index_tar(tmp_path / "train.tar")]})
    reader = ShardReader(str(tmp_path), "train")
    assert [reader.read(0, i).texts for i in range(2)] == [["a dog"], ["b"]]
    assert [sample.key for sample in reader] == ["a", "b"]


@pytest.mark.parametrize("twice", ["jpg", "JPG", "txt", "json", "image.npy"])
def test_a_member_that_stands_twice_makes_a_bad_sample(tmp_path: Path, twice: str) -> None:
    members = [*PAIR, ("a.json", b"{}"), ("a.image.npy", b"?"), (f"a.{twice}", b"{}")]
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(BadSample, match=rf"has a\.{twice.lower()} twice"):
        members_of(next(iter_groups(io.BytesIO((tmp_path / "train.tar").read_bytes()), "t")))
    write_manifest(tmp_path, {"train": [index_tar(tmp_path / "train.tar")]})
    with pytest.raises(BadSample, match=rf"train\.tar sample 0: has a\.{twice.lower()} twice"):
        ShardReader(str(tmp_path), "train").read(0, 0)


def test_a_member_beyond_the_limit_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tar", "reader"):
        monkeypatch.setattr(f"cmgan_dist.data.{module}.MOST_FILE_BYTES", 4096)
    assert tar_module.MOST_FILE_BYTES == 4096
    members = [("a.jpg", bytes(5000)), PAIR[1], ("b.jpg", b"x"), ("b.mp4", bytes(9000)), ("b.txt", b"b")]
    write_tar(tmp_path / "train.tar", members)
    write_manifest(tmp_path, {"train": [index_tar(tmp_path / "train.tar")]})
    reader = ShardReader(str(tmp_path), "train")
    with pytest.raises(BadSample, match=r"sample 0: a\.jpg has more than"):
        reader.read(0, 0)
    assert reader.read(0, 1).texts == ["b"]
    assert [sample.key for sample in reader] == ["b"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"label": 1, "label": 2}', "it has 'label' twice"),
        ('{"label": 1, "labels": [2]}', "keep one"),
        ('{"label": "dog"}', "label 'dog' is not an integer"),
        ('{"label": "1"}', "is not an integer"),
        ('{"label": ["dog", 1]}', "is not an integer or a name"),
        ('{"label": "a\\nb"}', "is not the name of a class"),
        ('{"label": 1.5}', "is not an integer"),
        ('{"label": 1e9}', "is out of range"),
        ('{"labels": ["dog", ""]}', "its label is empty"),
        ('{"label": "[\\"dog\\", \\"cat\\"]"}', "is a list in a text: write the list itself"),
        ('{"label": "[\'dog\']"}', "is a list in a text: write the list itself"),
        ('{"label": true}', "is not an integer"),
        ('{"labels": [[1]]}', "is not an integer"),
        ('{"texts": ["a", null]}', "non-empty strings"),
        ('{"texts": [["a"]]}', "non-empty strings"),
        ('{"texts": [true]}', "non-empty strings"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\u001b[2J"', "is not a JSON object"),
    ],
)
def test_a_record_of_another_kind_is_a_bad_sample(record: str, said: str) -> None:
    with pytest.raises(BadSample) as error:
        parse_sample("k\n", {"jpg": b"x", "txt": b"a", "json": record.encode()})
    assert said in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("record", "cls", "labels"),
    [
        ('{"label": "dog"}', "", (1,)),
        ('{"labels": ["dog", " cat ", "dog"]}', "", (0, 1)),
        ('{"label": "dog", "labels": [1]}', "", (1,)),
        ('{"label": "dog| cat|"}', "", (0, 1)),
        ('{"label": 1.0}', "", (1,)),
        ('{"labels": [0.0, 1]}', "", (0, 1)),
        ('{"label": NaN}', "1.0", (1,)),
        ('{"label": ""}', "+1", (1,)),
        ('{"label": " "}', "", "has no label"),
        ('{"label": NaN}', "", "has no label"),
        ("{}", " ", "has no label"),
        ('{"label": "|"}', "", "has no label"),
        ('{"label": 1}', " ", (1,)),
        ("{}", "cat\n", (0,)),
        ("{}", "\ufeffdog", (1,)),
        ('{"label": "cafe\u0301"}', "", (2,)),
        ('{"label": "dog"}', "0", (1,)),  # a number and a name are not compared
        ('{"label": 1}', "cat", (1,)),
        ('{"label": "dog"}', "dog", (1,)),
        ('{"label": "cow"}', "", "label 'cow' is none of the 3 classes"),
        ("{}", "cow", "label 'cow' is none of the 3 classes"),
        ('{"label": "dog"}', "cat", r"k\.cls holds 'cat', its JSON has the labels \['dog'\]: keep one"),
        ('{"label": "dog", "labels": [0]}', "", "keep one"),
    ],
)
def test_labels_may_be_the_names_of_the_classes(record: str, cls: str, labels: tuple[int, ...] | str) -> None:
    judge = Judge("multi", 3, None, None, ("cat", "dog", "caf\u00e9"))
    members = {"jpg": b"x", "txt": b"a", "json": record.encode()} | ({"cls": cls.encode()} if cls else {})
    if isinstance(labels, str):
        with pytest.raises(BadSample, match=labels):
            judge.read("k", members)
    else:
        assert judge.read("k", members).labels == labels


def test_members_are_bounded() -> None:
    for extension, data in (("txt", b"a" * (MOST_TEXT_BYTES + 1)), ("json", b" " * (MOST_JSON_BYTES + 1))):
        with pytest.raises(BadSample, match="has more than"):
            parse_sample("k", {"jpg": b"x", "txt": b"a"} | {extension: data})
    huge = npy_header(MOST_NUMBERS + 1)
    with pytest.raises(BadSample, match="numbers, more than"):
        parse_array(huge, "x.npy")


def npy_header(numbers: int) -> bytes:
    return npy_of_one().replace(b"(1,), }" + b" " * len(str(numbers)), f"({numbers},), }}".encode() + b" ")


def npy_of_one() -> bytes:
    import numpy as np

    return npy(np.zeros(1, np.float32))


def sample_of(**record: object) -> dict[str, bytes]:
    return {"jpg": b"x", "txt": b"a", "json": json.dumps(record).encode()}


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("single", {}, "has no label"),
        ("multi", {"labels": []}, "has no label"),
        ("single", {"label": None}, "has no label"),
        ("single", {"labels": [0, 1]}, "has 2 labels, expected one"),
        ("multi", {"labels": [0, 3]}, "label 3 is out of range, there are 3 classes"),
        ("single", {"label": -1}, "label -1 is out of range"),
    ],
)
def test_labels_are_those_that_the_data_set_has(kind: str, record: dict[str, object], said: str) -> None:
    with pytest.raises(BadSample, match=said):
        Judge(kind, 3, None, None).read("k", sample_of(**record))
    assert Judge("none", 0, None, None).read("k", sample_of(**record)).labels == ()


def test_without_labels_what_samples_say_of_them_is_ignored() -> None:
    assert Judge("none", 0, None, None).read("k", sample_of(label="dog")).labels == ()
    assert Judge("multi", 3, None, None).read("k", sample_of(labels=[2, 0, 2])).labels == (0, 2)
