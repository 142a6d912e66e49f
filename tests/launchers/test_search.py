"""Indexing and searching by the commands that a user runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cmgan_dist.errors import run_main
from cmgan_dist.models.saved import MODEL_NAME, read_model
from cmgan_dist.retrieval.model import load_model
from launchers.search import printable
from tests.retrieval.embeddings_cases import make_embeddings
from tests.toy import ROOT, environment, jpeg, make_raw, save_untrained, small_config

HOSTILE = "\x1b]0;owned\x07red\x1b[31m \u202edog\n\x9b2J [bold]tail[/] 🏳️\u200d🌈"


@dataclass
class World:
    """A model of raw pictures and texts, and an index that it made."""

    run: Path
    index: Path
    folder: Path


class Done(NamedTuple):
    """What a command left."""

    returncode: object
    stdout: str
    stderr: str


def launch(name: str, *words: str | Path) -> Done:
    """Run launchers/NAME.py in this process, which saves the seconds that torch takes to import."""
    module = importlib.import_module(f"launchers.{name}")
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_main(module.main)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def run(code: str) -> str:
    """Run Python code in a process of its own; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("search")
    config = small_config(8)
    config.model.image.name, config.model.image.image_size = "test_efficientnet", 32
    config.model.text.name, config.model.text.channels = "cnn", 4
    save_untrained(folder / "run", make_raw(folder / "raw"), config)
    saved = read_model(folder / "run")
    model = load_model(folder / "run")
    texts = ["red dog", "green boat", "blue boat dog", "red red green"]
    pictures = [jpeg(np.random.default_rng(i)) for i in range(3)]
    (folder / "second.jpg").write_bytes(pictures[1])
    vectors = np.concatenate([model.encode_images(pictures), model.encode_texts(texts)])
    captions = {3 + i: text for i, text in enumerate(texts)} | {5: HOSTILE}
    sha = saved.spec.files[MODEL_NAME]
    make_embeddings(folder / "emb", [(3, 4)], vectors=vectors, captions=captions, model=sha, run=str(folder / "run"))
    done = launch("index", folder / "emb", "--output", folder / "index")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"index: 7 vectors of 8 numbers, exact\nrecall@10 1\.000, score by chance -?0\.\d+ ± 0\.\d+\n", done.stdout
    )
    return World(folder / "run", folder / "index", folder)


def test_a_text_finds_its_caption(world: World) -> None:
    done = launch("search", world.index, "green boat", "-k", "3", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [hit["rank"] for hit in record["hits"]] == [1, 2, 3]
    first = record["hits"][0]
    assert (first["caption"], first["modality"], first["id"], first["labels"]) == ("green boat", "text", 4, ["boat"])
    assert first["score"] == pytest.approx(1, abs=1e-5)
    mean, std = record["chance"]["mean"], record["chance"]["std"]
    assert first["above_chance"] == pytest.approx((first["score"] - mean) / std)


def test_a_picture_finds_itself_among_images_of_a_class(world: World) -> None:
    picture = world.folder / "second.jpg"
    done = launch("search", world.index, "--image", picture, "--modality", "image", "--json")
    assert [hit["modality"] for hit in json.loads(done.stdout)["hits"]] == ["image"] * 3
    assert json.loads(done.stdout)["hits"][0]["id"] == 1
    done = launch("search", world.index, "--image", picture, "--classes", "car, animal", "--json", "--run", world.run)
    assert {hit["labels"][0] for hit in json.loads(done.stdout)["hits"]} == {"car", "animal"}


def test_the_table_is_plain_text(world: World) -> None:
    done = launch("search", world.index, "blue boat dog")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["#", "score", "chance", "key", "caption", "classes"]
    assert len(lines) == 8
    assert re.match(r"1 +1\.000 +[+-]\d+\.\d sd +text +train0-2 +", lines[1])
    assert "[bold]tail[/]" in lines[1]
    assert "\\x1b]0;owned\\x07red\\x1b[31m \\u202edog \\x9b2J" in lines[1]
    hidden = [c for c in done.stdout if not c.isprintable() and c not in "\n\u200d"]
    assert not hidden
    as_json = launch("search", world.index, "blue boat dog", "--json").stdout
    assert as_json.isascii()
    assert not [c for c in as_json if not c.isprintable() and c != "\n"]
    assert json.loads(as_json)["hits"][0]["caption"] == HOSTILE


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("a\tb\r\nc\u2028d") == "a b c d"
    assert printable("\x00\x7f\x85x\u200e\ud800") == "\\x00\\x7f x\\u200e\\ud800"
    assert printable("Ärger 犬 👩\u200d🚀") == "Ärger 犬 👩\u200d🚀"


def test_nothing_near_is_said(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    from cmgan_dist.retrieval.index import Index
    from launchers.search import show

    index = Index.open(world.index)
    show(index, index.search(-index.vector(0), 1)[0])
    assert "nothing is near: 9 in 10 items of the index find others at 0." in capsys.readouterr().err
    show(index, [])
    assert "no item fits --modality and --classes" in capsys.readouterr().err


def test_items_are_added_and_removed(world: World, tmp_path: Path) -> None:
    sha = json.loads((world.index / "index.json").read_text())["model"]["sha256"]
    make_embeddings(tmp_path / "more", [(2, 0)], dim=8, model=sha, prefix="more")
    assert launch("index", world.folder / "emb", "--output", tmp_path / "index").returncode == 0
    done = launch("index", tmp_path / "index", "--add", tmp_path / "more")
    assert done.stdout.startswith("added: 2\n")
    done = launch("index", tmp_path / "index", "--remove", "more0-1", "train0-0")
    assert done.stdout.startswith("removed: 4\n"), done.stderr
    assert "5 vectors" in done.stdout


Refusal = Callable[[World, Path], tuple[str, list[str | Path]]]


def another_model(world: World, tmp: Path) -> tuple[str, list[str | Path]]:
    make_embeddings(tmp / "emb", [(2, 2)])
    assert launch("index", tmp / "emb", "--output", tmp / "index").returncode == 0
    return "search", [tmp / "index", "a dog", "--run", world.run]


def gone_run(world: World, tmp: Path) -> tuple[str, list[str | Path]]:
    make_embeddings(tmp / "emb", [(2, 2)])
    assert launch("index", tmp / "emb", "--output", tmp / "index").returncode == 0
    return "search", [tmp / "index", "a dog"]


def added_from_another_model(world: World, tmp: Path) -> tuple[str, list[str | Path]]:
    make_embeddings(tmp / "emb", [(2, 2)], dim=8)
    return "index", [world.index, "--add", tmp / "emb"]


REFUSALS: list[tuple[str, Refusal]] = [
    ("give a text or --image FILE to search by", lambda w, _: ("search", [w.index])),
    ("give a text or --image FILE to search by", lambda w, _: ("search", [w.index, "dog", "--image", "a.jpg"])),
    ("-k is 0: it must be at least 1", lambda w, _: ("search", [w.index, "dog", "-k", "0"])),
    ("class 'boot' is unknown: did you mean 'boat'?", lambda w, _: ("search", [w.index, "dog", "--classes", "boot"])),
    ("index.json does not exist: make the index", lambda w, tmp: ("search", [tmp, "dog"])),
    ("image 0 (nowhere.jpg) cannot be read", lambda w, _: ("search", [w.index, "--image", "nowhere.jpg"])),
    ("was made with another model than", another_model),
    ("is not at 'runs/nowhere': name its run by --run", gone_run),
    ("none of --output, --add and --remove is given", lambda w, _: ("index", [w.index])),
    ("more than one of --output, --add", lambda w, t: ("index", [w.index, "--output", t, "--remove", "a"])),
    ("has the key 'nobody': name one that has", lambda w, _: ("index", [w.index, "--remove", "nobody"])),
    ("was made with another model (runs/nowhere) than the index", added_from_another_model),
    ("embeddings.json", lambda w, tmp: ("index", [tmp / "nowhere", "--output", tmp / "index"])),
]


@pytest.mark.parametrize(("sentence", "case"), REFUSALS, ids=[f"{i}" for i in range(len(REFUSALS))])
def test_bad_input_is_one_sentence(sentence: str, case: Refusal, world: World, tmp_path: Path) -> None:
    name, words = case(world, tmp_path)
    done = launch(name, *words)
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]


def test_nothing_heavy_is_imported_before_the_cheap_checks(world: World) -> None:
    code = f"""
import sys
from launchers import index, search
sys.argv = ["search", {str(world.index)!r}, "dog", "--classes", "boot"]
try:
    search.main()
except Exception as error:
    print(error)
print(sorted({{"torch", "timm", "faiss", "sentence_transformers", "sklearn", "fsspec"}} & set(sys.modules)))
"""
    shown = run(code)
    assert "did you mean 'boat'" in shown
    assert shown.splitlines()[-1] == "[]"


def test_a_text_query_reads_no_image_backbone(world: World) -> None:
    code = f"""
import sys
from launchers import search
sys.argv = ["search", {str(world.index)!r}, "dog"]
search.main()
print(sorted({{"timm", "faiss", "sentence_transformers", "sklearn"}} & set(sys.modules)))
"""
    assert run(code).splitlines()[-1] == "[]"
