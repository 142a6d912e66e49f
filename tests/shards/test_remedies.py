"""What sentences of `python -m shards` say to do leads out: a wrong input or command, its sentence, and what follows
that advice."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.errors import BadInput
from tests.toy import fill_folder, make_raw, picture, run_shards

EVERYTHING = ["--val", "0", "--test", "0", "--processes", "1"]


def refused(sentence: str, *words: object) -> None:
    with pytest.raises(BadInput, match=sentence):
        run_shards(*words)


@pytest.mark.parametrize(("count", "texts"), [(1, 1), (4, 4), (8, 8), (12, 1), (40, 1)])
def test_flags_that_fill_or_leave_away_drawn_splits_do_so(
    count: int, texts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "raw"
    place.mkdir()
    for i in range(count):
        (place / f"{i}.png").write_bytes(picture(i))
        (place / f"{i}.txt").write_text(f"text {i % texts}")
    words = ["build", "folder", place, "--processes", 1]
    with pytest.raises(BadInput, match="has no samples") as found:
        run_shards(*words, "--output", tmp_path / "none")
    ways = re.findall(r"pass ((?:--\w+ [\w.]+ ?)+)", str(found.value))
    assert ways[-1] == "--val 0 --test 0"
    assert ("--together images" in ways) <= (texts < count)
    assert ("--together images" in ways) >= (count == 40)
    for number, way in enumerate(ways):
        run_shards(*words, "--output", tmp_path / str(number), *way.split())


def test_a_command_that_is_printed_names_a_place_as_a_shell_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_raw(tmp_path / "my set", counts={"train": 12})
    run_shards("index", "--overwrite", data, "--processes", 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "there is no split 'val'" in line]
    command = line.partition("'python -m shards ")[2].removesuffix("' draws one")
    run_shards(*shlex.split(command.replace("NEW", shlex.quote(str(tmp_path / "new set")))))
    assert "val" in load_manifest(tmp_path / "new set").splits
    (data / "manifest.json").unlink()
    with pytest.raises(BadInput, match="write it with") as found:
        load_manifest(data)
    run_shards(*shlex.split(str(found.value).partition("'python -m shards ")[2].removesuffix("'")))
    assert load_manifest(data).samples("train") == 12


# ---------------------------------------------------------------------------------------------- tables

ROWS = "0.png,zero\n1.png,one\n"
TABLES: list[tuple[str, bytes | str, str, str, str, bytes | str, str]] = [
    # name, content, words, sentence; name, content and words that follow it
    ("t.txt", "image,text\n" + ROWS, "", r"expected .*\.csv", "t.csv", "image,text\n" + ROWS, ""),
    ("t.csv", "image,text\n" + ROWS, "--delimiter ab", "give a single character", "t.csv", "image,text\n" + ROWS, ""),
    (
        "t.csv",
        "image;text\n" + ROWS.replace(",", ";"),
        "",
        "pass --delimiter ';'",
        "t.csv",
        "image;text\n" + ROWS.replace(",", ";"),
        "--delimiter ;",
    ),
    (
        "t.csv",
        "image,text\n0.png,K\u00e4fer\n".encode("latin-1"),
        "",
        "name its own by --encoding",
        "t.csv",
        "image,text\n0.png,K\u00e4fer\n".encode("latin-1"),
        "--encoding latin-1",
    ),
    ("t.csv", "image,text\n" + ROWS, "--encoding none", "give one as latin-1", "t.csv", "image,text\n" + ROWS, ""),
    (
        "t.csv",
        "place,words\n" + ROWS,
        "--text-column words",
        "no image column that is recognised: name it with --image-column",
        "t.csv",
        "place,words\n" + ROWS,
        "--text-column words --image-column place",
    ),
    (
        "t.csv",
        "place,words\n" + ROWS,
        "--image-column place",
        "no text column that is recognised: name it with --text-column",
        "t.csv",
        "place,words\n" + ROWS,
        "--text-column words --image-column place",
    ),
    (
        "t.csv",
        "image,text,text\n0.png,a,b\n",
        "",
        "has two columns 'text': rename one",
        "t.csv",
        "image,text,more\n0.png,a,b\n",
        "",
    ),
    (
        "t.csv",
        "image,text,,\n0.png,a,,\n",
        "",
        "has no name for its columns 3 and 4: give each its own, or remove those columns",
        "t.csv",
        "image,text\n0.png,a\n",
        "",
    ),
    (
        "t.csv",
        "image,text\n0.png,a,b\n",
        "",
        "put a text that holds the separator in quotes",
        "t.csv",
        'image,text\n0.png,"a,b"\n',
        "",
    ),
    (
        "t.csv",
        'image,text\n0.png,"a\n',
        "",
        "close the quote that opens there",
        "t.csv",
        'image,text\n0.png,"a"\n',
        "",
    ),
    (
        "t.csv",
        'image,text\n0.png,"a "big" dog"\n',
        "",
        "write a quote inside a text twice, in a text that is in quotes",
        "t.csv",
        'image,text\n0.png,"a ""big"" dog"\n',
        "",
    ),
    (
        "t.csv",
        "image,text,label\n0.png,a,1\n1.png,b,01\n",
        "",
        "are the same number: write it in one way",
        "t.csv",
        "image,text,label\n0.png,a,1\n1.png,b,1\n",
        "",
    ),
    (
        "t.csv",
        "image,text,split\n0.png,a,train\n1.png,b,val\n",
        "--val 0.5",
        "there is a split 'val' already: pass --val 0",
        "t.csv",
        "image,text,split\n0.png,a,train\n1.png,b,val\n",
        "--val 0",
    ),
]


@pytest.mark.parametrize(("name", "content", "words", "sentence", "as_name", "as_content", "as_words"), TABLES)
def test_a_table(
    name: str,
    content: bytes | str,
    words: str,
    sentence: str,
    as_name: str,
    as_content: bytes | str,
    as_words: str,
    tmp_path: Path,
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))

    def given(name: str, content: bytes | str, words: str) -> list[object]:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        own = [] if b"split" in data else EVERYTHING[:4]
        build = ["build", "table", tmp_path / name, "--output", tmp_path / "out", "--processes", 1]
        return [*build, *own, *words.split()]

    refused(sentence, *given(name, content, words))
    run_shards(*given(as_name, as_content, as_words))
    assert (tmp_path / "out" / "manifest.json").exists()


# ---------------------------------------------------------------------------------------------- folders


def lone_text(raw: Path) -> None:
    (raw / "a" / "9.txt").write_text("nine")


def add_its_picture(raw: Path) -> None:
    shutil.copy(raw / "a" / "0.png", raw / "a" / "9.png")


def lone_picture(raw: Path) -> None:
    shutil.copy(raw / "a" / "0.png", raw / "9.png")
    (raw / "9.txt").write_text("nine")


def move_into_a_class(raw: Path) -> None:
    for ending in ("png", "txt"):
        (raw / f"9.{ending}").rename(raw / "b" / f"9.{ending}")


def same_name(raw: Path) -> None:
    shutil.copy(raw / "a" / "0.png", raw / "a" / "0.jpg")


def rename_one(raw: Path) -> None:
    (raw / "a" / "0.jpg").rename(raw / "a" / "9.jpg")
    (raw / "a" / "9.txt").write_text("nine")


def control(raw: Path) -> None:
    (raw / "a").rename(raw / "a\tb")


def rename_it(raw: Path) -> None:
    (raw / "a\tb").rename(raw / "a")


@pytest.mark.parametrize(
    ("spoil", "sentence", "mend"),
    [
        (lone_text, "no image of the same name: add it or move the text away", add_its_picture),
        (
            lone_text,
            "no image of the same name: add it or move the text away",
            lambda raw: (raw / "a" / "9.txt").unlink(),
        ),
        (lone_picture, "beside the class folder 'a': move it into one", move_into_a_class),
        (same_name, "the same key .* rename one of them", rename_one),
        (control, "holds control characters: rename it", rename_it),
    ],
)
def test_a_folder(spoil: Callable[[Path], None], sentence: str, mend: Callable[[Path], None], tmp_path: Path) -> None:
    fill_folder(tmp_path / "raw", [f"{c}/{i}" for c in "ab" for i in range(2)])
    spoil(tmp_path / "raw")
    words = ["build", "folder", tmp_path / "raw", "--output", tmp_path / "out", *EVERYTHING]
    refused(sentence, *words)
    mend(tmp_path / "raw")
    run_shards(*words)


def test_a_folder_of_splits(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    fill_folder(raw, [f"{split}/{c}/{i}" for split in ("train", "val") for c in "ab" for i in range(2)])
    (raw / "old").mkdir()
    words = ["build", "folder", raw, "--output", tmp_path / "out", "--processes", 1]
    refused(r"old stands beside the split folders train, val: move it away, or into one", *words)
    (raw / "old").rename(raw / "train" / "old")
    refused(r"--output .*raw is the input folder itself: name another", *[raw if w == words[4] else w for w in words])
    run_shards(*words)


# ---------------------------------------------------------------------------------------------- COCO

IMAGES = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
CAPTIONS = [{"image_id": i, "caption": f"text {i}"} for i in range(2)]
COCO: list[tuple[object, str]] = [
    ({"annotations": CAPTIONS}, "has no list 'images' of objects: give a file in COCO's format"),
    ({"images": IMAGES, "annotations": []}, "has no captioned picture: give another file"),
    ({"images": [*IMAGES, {"id": 2}], "annotations": CAPTIONS}, "image 2 has no id or no file_name: mend or remove it"),
    ({"images": [*IMAGES, IMAGES[0]], "annotations": CAPTIONS}, "0.png, stands twice: remove one"),
    ([], "is not in COCO's format: expected an object with images and annotations"),
]


@pytest.mark.parametrize(("wrong", "sentence"), COCO)
def test_captions_of_coco(wrong: object, sentence: str, tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    path = tmp_path / "captions.json"
    words = ["build", "coco", path, "--images", tmp_path, "--output", tmp_path / "out", *EVERYTHING]
    path.write_text(json.dumps(wrong))
    refused(sentence, *words)
    path.write_text(json.dumps({"images": IMAGES, "annotations": CAPTIONS}))
    run_shards(*words)


# ---------------------------------------------------------------------------------------------- data sets


SPLIT = "split DATA --output NEW --test 0"


@pytest.mark.parametrize(
    ("wrong", "sentence", "right"),
    [
        (f"{SPLIT} --val 0", "are 0: give one of them a share", f"{SPLIT} --val 0.3"),
        ("split DATA --output DATA --val 0.3", "is the data set itself: name another", f"{SPLIT} --val 0.3"),
        (
            "split DATA --output NEW --val 0.3 --shard-samples 0",
            "it must be at least 1",
            "split DATA --output NEW --val 0.3 --shard-samples 1",
        ),
        ("verify DATA --processes 0", "it must be at least 1", "verify DATA --processes 1"),
        ("stats NONE", "pack one with 'python -m shards build'", "stats DATA"),
        ("build folder RAW --output NEW --task 4/4", "such as 0/4", "build folder RAW --output NEW --task 0/4"),
        (
            "build folder RAW --output NEW --work W",
            "--work is for an --output that is a URL, .*: leave it away",
            "build folder RAW --output NEW",
        ),
        ("build fold RAW --output NEW", "choose one of .*folder", "build folder RAW --output NEW"),
    ],
)
def test_a_command(wrong: str, sentence: str, right: str, tmp_path: Path) -> None:
    make_raw(tmp_path / "DATA", counts={"train": 24})
    fill_folder(tmp_path / "RAW", [f"{c}/{i}" for c in "ab" for i in range(10)])

    def words(text: str) -> list[object]:
        return [tmp_path / word if word.isupper() else word for word in text.split()]

    refused(sentence, *words(wrong))
    assert not run_shards(*words(right))


# ---------------------------------------------------------------------------------------------- a manifest


def lose(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def rename_field(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"splits"', '"parts"'))


def older(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"version": 1', '"version": 0'))


@pytest.mark.parametrize("spoil", [lose, cut, rename_field, older])
def test_the_manifest_of_a_finished_build(spoil: Callable[[Path], None], tmp_path: Path, capsys) -> None:
    fill_folder(tmp_path / "in", [f"{c}/{i}" for c in ("cat", "dog") for i in range(3)])
    out, words = tmp_path / "out", ["build", "folder", tmp_path / "in", "--output", tmp_path / "out", *EVERYTHING]
    run_shards(*words)
    whole = (out / "manifest.json").read_bytes()
    tar = (out / "train-000000.tar").stat()
    spoil(out)
    with pytest.raises(BadInput) as error:
        load_manifest(out)
    said = str(error.value)
    if "start the same 'python -m shards build'" in said:
        run_shards(*words)
    elif "pack the data again" in said:
        refused("pass --overwrite to replace it", *words)
        run_shards(*words, "--overwrite")
    else:
        assert f"remove it and run 'python -m shards index --overwrite {out}'" in said
        lose(out)
        run_shards("index", "--overwrite", out)
        assert load_manifest(out).samples("train") == 6
        assert "the 2 classes have numbers for names" in capsys.readouterr().out
        run_shards(*words, "--overwrite")
    assert (out / "manifest.json").read_bytes() == whole
    assert (out / "train-000000.tar").stat().st_mtime_ns == tar.st_mtime_ns, "shards that are there are kept"
