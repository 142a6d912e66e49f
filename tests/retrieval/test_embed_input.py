"""What is embedded may be anything: each fault is a sentence or a bad sample by name, never half a set of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import ledger
from cmgan_dist.retrieval import embed_source
from cmgan_dist.retrieval.embed_part import Worker
from cmgan_dist.retrieval.embeddings import (
    ITEMS,
    EmbeddingManifest,
    EmbeddingSet,
    ModelIdentity,
    SourceIdentity,
    write_shard,
)
from tests.retrieval.embed_cases import embedded, files, raw_run, whole
from tests.toy import jpeg


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return raw_run(tmp_path)[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of one good picture."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "good.jpg").write_bytes(jpeg(np.random.default_rng(0)))
    return tmp_path / "pictures"


def keys_of(made: EmbeddingSet) -> list[str]:
    return [key for shard in made for key in made.items(shard)["key"].to_pylist()]


def left_out_of(emb: Path) -> list[str]:
    return [line for path in sorted(emb.glob("*.record.json")) for line in json.loads(path.read_text())["left_out"]]


def make_large(path: Path) -> None:
    """A gigabyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(1 << 30)


# ---------------------------------------------------------------------------------------------- pictures


def test_folders_that_link_to_each_other_are_embedded_once(run: Path, pictures: Path, tmp_path: Path) -> None:
    good = (pictures / "good.jpg").read_bytes()
    for name, other in (("a", "b"), ("b", "a")):
        (pictures / name).mkdir()
        (pictures / name / f"{name}.jpg").write_bytes(good)
        (pictures / name / "to").symlink_to(f"../{other}")
    assert keys_of(whole(run, tmp_path / "emb", pictures=pictures)) == ["a/a.jpg", "b/b.jpg", "good.jpg"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("/nowhere"), r"cannot be read (No such file or directory)"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (make_large, "has more than 256 MiB"),
        (lambda path: path.write_bytes(b"no picture"), "the image does not decode"),
    ],
)
def test_what_is_no_picture_is_named_or_left_out(
    make: Callable[[Path], object], said: str, run: Path, pictures: Path, tmp_path: Path
) -> None:
    make(pictures / "z.png")
    with pytest.raises(BadInput) as caught:
        embedded(run, tmp_path / "emb", pictures=pictures)
    assert f"pictures: z.png: {said}" in str(caught.value)
    assert str(caught.value).endswith("or pass --skip-bad to leave such samples out")
    assert keys_of(whole(run, tmp_path / "emb", pictures=pictures, skip_bad=True)) == ["good.jpg"]
    assert len(left_out_of(tmp_path / "emb")) == 1
    before = files(tmp_path / "emb")
    whole(run, tmp_path / "emb", pictures=pictures, skip_bad=True)
    assert files(tmp_path / "emb") == before


def test_a_folder_of_bad_pictures_alone_is_no_set(run: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "good.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no sample that can be embedded \(the first: good.jpg: .*\): mend some"):
        whole(run, tmp_path / "emb", pictures=pictures, skip_bad=True)
    assert not (tmp_path / "emb" / "embeddings.json").exists()


def test_hidden_pictures_are_passed_over_aloud(
    run: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / ".cache").mkdir()
    for name in (".cache/a.jpg", ".b.JPG", ".DS_Store"):
        (pictures / name).write_bytes(b"")
    assert keys_of(whole(run, tmp_path / "emb", pictures=pictures)) == ["good.jpg"]
    assert "2 hidden files and folders are passed over, the first is .b.JPG" in caplog.text


def test_names_that_are_not_utf8_or_hold_a_line_end(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (pictures / "good.jpg").read_bytes()
    for name in (b"q\xfe.jpg", b"q\xff.jpg", b"two\nlines.jpg"):
        (pictures / os.fsdecode(name)).write_bytes(good)
    for name in (b"bad\xfe.png", b"bad\nline.png"):
        (pictures / os.fsdecode(name)).write_bytes(b"zz")
    with pytest.raises(BadInput, match=r"pictures: bad\\nline\.png: the image"):
        embedded(run, tmp_path / "emb", pictures=pictures)
    made = whole(run, tmp_path / "emb", pictures=pictures, skip_bad=True)
    assert keys_of(made) == ["good.jpg", r"q\udcfe.jpg", r"q\udcff.jpg", "two\nlines.jpg"]
    assert [line.partition(":")[0] for line in left_out_of(tmp_path / "emb")] == [r"bad\nline.png", r"bad\udcfe.png"]
    assert "left out 2 bad samples" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["pictures", "output", "run"])
def test_a_folder_that_no_file_could_name_is_refused_before_the_work(
    what: str, run: Path, pictures: Path, tmp_path: Path
) -> None:
    places = {"run": run, "output": tmp_path / "emb", "pictures": pictures}
    odd = tmp_path / os.fsdecode(b"n\xffn")
    if what != "output":
        places[what].rename(odd)
    places[what] = odd
    with pytest.raises(BadInput, match=r"n\\udcffn is not UTF-8, .*: rename it"):
        embedded(places["run"], places["output"], pictures=places["pictures"])
    assert not places["output"].exists()


def test_a_picture_that_needs_too_much_memory_is_left_out(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(data: bytes, size: int, out: np.ndarray) -> None:
        raise MemoryError

    monkeypatch.setattr(embed_source, "decode_image", decode)
    with pytest.raises(BadInput, match="has no sample that can be embedded"):
        whole(run, tmp_path / "emb", pictures=pictures, skip_bad=True)
    assert left_out_of(tmp_path / "emb") == ["good.jpg: takes more memory than there is"]


@pytest.mark.parametrize("kind", ["pictures", "texts"])
@pytest.mark.parametrize("when", ["listed", "embedded"])
def test_what_changes_meanwhile_leaves_no_files(
    kind: str, when: str, run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\na cat\n")
    changed = pictures / "good.jpg" if kind == "pictures" else texts
    project = Worker.project

    def changing(self: Worker, part: embed_source.Part, left_out: list[str]) -> object:
        if when == "listed":
            changed.unlink()
        made = project(self, part, left_out)
        changed.write_bytes(b"something else\n")
        return made

    monkeypatch.setattr(Worker, "project", changing)
    with pytest.raises(BadInput, match=r"was changed while it was embedded: start again|cannot be read"):
        embedded(run, tmp_path / "emb", **{kind: changed if kind == "texts" else pictures})
    assert files(tmp_path / "emb") == {}


# ---------------------------------------------------------------------------------------------- texts


def test_half_a_character_is_a_bad_text(run: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"key":"a","text":"a dog"}\n{"key":"b","text":"\\ud800 cat"}\n{"key":"\\ud800","text":"bird"}\n')
    with pytest.raises(BadInput, match=r"texts\.jsonl: line 2: has half a character.*--skip-bad"):
        embedded(run, tmp_path / "emb", texts=texts)
    made = whole(run, tmp_path / "emb", texts=texts, skip_bad=True)
    assert keys_of(made) == ["a", r"\ud800"]
    assert left_out_of(tmp_path / "emb") == ["line 2: has half a character, a lone surrogate, in its text"]


def test_the_ending_jsonl_counts_in_any_case(run: Path, tmp_path: Path) -> None:
    (tmp_path / "up.JSONL").write_text('{"key":"a","text":"a dog"}\n')
    rows = whole(run, tmp_path / "emb", texts=tmp_path / "up.JSONL").items(0).to_pylist()
    assert [(row["key"], row["caption"]) for row in rows] == [("a", "a dog")]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("tail", ["", "{end}", "{end}{end}", "{end} {end}\t{end}{end}{end}"])
def test_lines_end_as_on_any_system(
    end: str, tail: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_source, "TEXTS", 2)
    lines = ["a dog", "a café", "a\x85b\u2028c", "boat"]
    texts = tmp_path / "texts.txt"
    texts.write_bytes(("\ufeff" + end.join(lines) + tail.format(end=end)).encode())
    made = whole(run, tmp_path / "emb", texts=texts)
    rows = [row for shard in made for row in made.items(shard).to_pylist()]
    assert [shard.texts for shard in made] == [2, 2]
    assert [(row["key"], row["caption"]) for row in rows] == [(str(n), line) for n, line in enumerate(lines, 1)]
    texts.write_bytes(end.join(["a", "b", "c", "", "d"]).encode())
    with pytest.raises(BadInput, match=r"texts\.txt: line 4: has no text"):
        embedded(run, tmp_path / "other", texts=texts)


@pytest.mark.parametrize("text", ["", "\n \r\n"])
def test_a_file_without_a_text_is_said_to_be_empty(text: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(text)
    with pytest.raises(BadInput, match=r"texts\.txt is empty: name a file with a text a line"):
        embedded(run, tmp_path / "emb", texts=tmp_path / "texts.txt")


# ---------------------------------------------------------------------------------------------- what is written


def test_nothing_is_written_of_a_part_whose_record_cannot_be(tmp_path: Path) -> None:
    record = ledger.Record("source", {"a set": {1}})
    with pytest.raises(TypeError):
        write_shard(FileStore(str(tmp_path / "emb"), "--output"), "part", {}, ITEMS.empty_table(), record)
    assert files(tmp_path) == {}


def test_class_names_that_are_not_utf8_come_back_as_they_were() -> None:
    model, source = ModelIdentity("0", "run", "Bär \ud800"), SourceIdentity("shards", "data")
    manifest = EmbeddingManifest(model, 8, "float32", source, classes=["猫", "\ud800"])
    assert "猫" in manifest.to_json()
    assert EmbeddingManifest.from_json(manifest.to_json().encode(), "here") == manifest


@pytest.mark.parametrize("key", ["null", '{"a": 1}', "1.0", "true", '""', '"\\u001b[2Jevil"', '"two\\nlines"'])
def test_a_key_that_is_no_name_is_a_bad_sample(key: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(f'{{"key": {key}, "text": "a dog"}}\n{{"key": 7, "text": "a cat"}}\n')
    found, left_out = texts_of(texts)
    assert found == [("7", "a cat")]
    assert len(left_out) == 1
    assert left_out[0].startswith("line 1: has the key ")
    assert left_out[0].isprintable()


def test_a_text_given_twice_is_a_bad_sample(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"key": "a", "text": "first", "text": "second"}\n{"text": "a cat"}\n')
    found, left_out = texts_of(texts)
    assert found == [("2", "a cat")]
    assert left_out == ["line 1: is not a JSON object (it has 'text' twice)"]


@pytest.mark.parametrize("second", ['"key": "a", ', '"key": "1", ', '"key": 1, '])
def test_two_texts_of_one_key_are_refused_naming_both_lines(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_source, "TEXTS", 3)  # the lines lie in two parts
    texts, first = tmp_path / "texts.jsonl", '"key": "a", ' if "a" in second else ""
    lines = [f'{{{first}"text": "x"}}', "no JSON", '{"key": "b", "text": "y"}', f'{{{second}"text": "z"}}']
    texts.write_text("\n".join(lines))
    with pytest.raises(BadInput, match=rf"{texts} has the key '[a1]' in lines 1 and 4: give each text its own"):
        texts_of(texts)
    lines[3] = '{"key": "own", "text": "z"}'
    texts.write_text("\n".join(lines))
    assert texts_of(texts)[0] == [("a" if first else "1", "x"), ("b", "y"), ("own", "z")]


def texts_of(file: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Keys and texts of a file, and what was left out."""
    source, left_out = embed_source.open_source("texts", str(file), StreamConfig()), list[str]()
    reading = embed_source.Reading(batch=8, image_size=8, threads=1)
    batches = [batch for part in source.parts(()) for batch in source.batches(part, reading, left_out)]
    return [(sample.key, text) for batch in batches for sample in batch.samples for text in sample.texts], left_out
