"""What sentences of embed, index, search, serve, export and the hub say to do leads out: a wrong command or call, its
sentence, and one that follows it. {} in a command is the folder of what `place` has made."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.model import Model, load_model
from launchers import embed, evaluate, index, search, serve
from tests.retrieval.embed_cases import raw_run
from tests.toy import call, make_features, make_raw, picture, save_untrained, small_config

COMMANDS = {
    "embed": embed.main,
    "index": index.main,
    "search": search.main,
    "evaluate": evaluate.main,
    "serve": serve.main,
}
DATA = "embed {}/run --data {}/raw --processes 1 --output {}"
PICTURES = "embed {}/run --pictures {}/pictures --processes 1 --output {}"
TEXTS = "embed {}/run --processes 1 --output {}"
SEARCH = "search {}/index --run {}/run"


def told(place: Path, words: str) -> tuple[int, str]:
    name, *rest = shlex.split(words)
    return call(COMMANDS[name], *(word.replace("{}", str(place)) for word in rest))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    raw_run(place)
    make_raw(place / "others", counts={"test": 5}, seed=3)
    make_raw(place / "renamed", counts={"test": 5})
    manifest = place / "renamed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"class 1"', '"class b"'))
    save_untrained(place / "features-run", make_features(place / "features"), small_config(8))
    (place / "pictures").mkdir()
    (place / "pictures" / "a.png").write_bytes(picture(1))
    (place / "pictures" / "b.png").write_bytes(b"no picture")
    (place / "empty").mkdir()
    (place / "empty.txt").write_text("\n")
    (place / "twice.jsonl").write_text('{"key": "a", "text": "a dog"}\n{"key": "a", "text": "a boat"}\n')
    (place / "once.jsonl").write_text('{"key": "a", "text": "a dog"}\n{"text": "a boat"}\n')
    (place / "query.png").write_bytes(picture(2))
    assert told(place, f"{DATA}/emb --splits test") == (0, "")
    assert told(place, f"{DATA}/float16 --splits val --dtype float16") == (0, "")
    assert told(place, "index {}/emb --output {}/index") == (0, "")
    return place


CASES = [
    (f"{TEXTS}/new", "name what is to be embedded by one of --data, --pictures and --texts", f"{DATA}/new"),
    (f"{DATA}/new --batch 0", "it must be at least 1", f"{DATA}/new --batch 1"),
    (f"{PICTURES}/new --splits test", "--splits is given without --data", f"{PICTURES}/new --skip-bad"),
    (f"{PICTURES}/new", "or pass --skip-bad to leave such samples out", f"{PICTURES}/new --skip-bad"),
    (
        f"{TEXTS}/new --pictures {{}}/none",
        r"is no folder: name one with \.jpg, \.png or \.webp",
        f"{PICTURES}/new --skip-bad",
    ),
    (f"{TEXTS}/new --pictures {{}}/empty", r"files: name another folder", f"{PICTURES}/new --skip-bad"),
    (f"{TEXTS}/new --texts {{}}/empty", "name one with a text a line", f"{TEXTS}/new --texts {{}}/once.jsonl"),
    (f"{TEXTS}/new --texts {{}}/empty.txt", "name a file with a text a line", f"{TEXTS}/new --texts {{}}/once.jsonl"),
    (
        f"{TEXTS}/new --texts {{}}/twice.jsonl",
        r"give each text its own \(a text without one has the number of its line\)",
        f"{TEXTS}/new --texts {{}}/once.jsonl",
    ),
    (
        f"{DATA}/emb --splits test --dtype float16",
        "name a new --output, or pass --overwrite to make it anew",
        f"{DATA}/emb --splits test --dtype float16 --overwrite",
    ),
    (
        "embed {}/run --data {}/others --processes 1 --output {}/float16 --dtype float16",
        "name a new --output, or pass --overwrite to remove them",
        "embed {}/run --data {}/others --processes 1 --output {}/float16 --dtype float16 --overwrite",
    ),
    (f"{DATA}/new --splits none", "has no split 'none'.*name another split", f"{DATA}/new --splits val"),
    (f"{DATA}/new --finish", "run the tasks that have them, then --finish", f"{DATA}/new"),
    ("embed {}/none --data {}/raw --output {}/new", "train it first, or name another", f"{DATA}/new"),
    (
        "embed {}/run --data {}/features --output {}/new",
        "name data of the same kind",
        "embed {}/features-run --data {}/features --processes 1 --output {}/new",
    ),
    ("index {}/emb", "none of --output, --add and --remove is given: give one", "index {}/emb --output {}/other"),
    ("index {}/emb --output {}/emb", "name another folder", "index {}/emb --output {}/other"),
    ("index {}/index --add {}/emb", "is in the index already: add others", "index {}/index --add {}/float16"),
    ("index {}/index --remove nobody", "has the key 'nobody': name one that has", "index {}/index --remove test0"),
    ("index {}/none --remove test0", "make the index by launchers/index.py", "index {}/emb --output {}/none"),
    (f"{SEARCH}", "give a text or --image FILE", f"{SEARCH} --image {{}}/query.png"),
    (f"{SEARCH} dog -k 0", "it must be at least 1", f"{SEARCH} dog -k 1"),
    (f"{SEARCH} dog --classes cat", "unknown: it has 'class 0', 'class 1'", f"{SEARCH} dog --classes 'class 0'"),
    (f"{SEARCH} --image {{}}/none.png", "name a picture", f"{SEARCH} --image {{}}/query.png"),
    (f"{SEARCH} --image {{}}/pictures/b.png", "give another picture", f"{SEARCH} --image {{}}/query.png"),
    (
        "search {}/index dog --run {}/features-run",
        "was made with another model than .*: embed and index again",
        f"{SEARCH} dog",
    ),
    (
        "evaluate {}/run --data {}/renamed --no-baselines",
        "name data with the same classes",
        "evaluate {}/run --data {}/raw --no-baselines",
    ),
    (
        "evaluate {}/run --data {}/features --no-baselines",
        "name data of the same kind",
        "evaluate {}/run --data {}/raw --no-baselines",
    ),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), CASES, ids=range(len(CASES)))
def test_a_command(wrong: str, sentence: str, right: str, whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(whole, place)
    code, said = told(place, wrong)
    assert (code, bool(re.search(sentence, said))) == (2, True), said
    assert told(place, right) == (0, "")


def lose_run(place: Path) -> str:
    (place / "run").rename(place / "moved")
    return "search {}/index dog --run {}/moved"


def lose_data(place: Path) -> str:
    (place / "raw").rename(place / "moved")
    return "evaluate {}/run --no-baselines --data {}/moved"


@pytest.mark.parametrize(
    ("lose", "wrong", "sentence"),
    [
        (lose_run, "search {}/index dog", "is not at .*: name its run by --run"),
        (lose_data, "evaluate {}/run --no-baselines", "is not at .*: name where it is by --data"),
    ],
)
def test_what_has_moved(lose: Callable[[Path], str], wrong: str, sentence: str, whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(whole, place)
    right = lose(place)
    shutil.move(whole, tmp_path / "hidden")  # where the index and the run say that they are
    try:
        code, said = told(place, wrong)
    finally:
        shutil.move(tmp_path / "hidden", whole)
    assert (code, bool(re.search(sentence, said))) == (2, True), said
    assert told(place, right) == (0, "")


def test_a_server(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has bound its port and read all that it needs ends here."""
    monkeypatch.setattr("cmgan_dist.retrieval.serve.serve", lambda *_: None)
    place = tmp_path / "place"
    shutil.copytree(whole, place)
    right = "serve {}/index --port 0 --run {}/run --data {}/raw"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (f"{right} --port {port}", "cannot be listened on .*: choose others"),
            (right.replace("/index", "/none"), "make the index by launchers/index.py"),
            (right.replace("{}/run", "{}/none"), "name its run by --run|train it first, or name another"),
            (right.replace("{}/raw", "{}/features"), "holds no encoded pictures: name the raw shards"),
        ]
        for wrong, sentence in cases:
            code, said = told(place, wrong)
            assert (code, bool(re.search(sentence, said))) == (2, True), said
            assert told(place, right) == (0, "")


def test_an_export(whole: Path, tmp_path: Path) -> None:
    model = load_model(whole / "features-run")
    for wrong, modality, sentence in (
        ("model.bin", "image", r"ends in '\.bin': name a file that ends in \.onnx or \.pt2"),
        ("model.pt2", "sound", "it must be image or text"),
        ("file/model.pt2", "image", "cannot be written .*: free space there or name another"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(BadInput, match=sentence):
            model.export(tmp_path / wrong, modality=modality)
        assert [path.exists() for path in model.export(tmp_path / "model.pt2", modality="image")] == [True]


def test_a_folder_to_give_away(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "features-run", run)
    model = load_model(run)
    (tmp_path / "file").touch()
    for wrong, sentence in ((run, "is a run's own folder: name another"), (tmp_path / "file", "name another")):
        with pytest.raises(BadInput, match=sentence):
            model.save_pretrained(wrong)
        model.save_pretrained(tmp_path / "given")
    with pytest.raises(BadInput, match=r"name a folder with model\.json, or a model as 'owner/name'"):
        Model.from_pretrained(str(tmp_path / "gone"))
    assert Model.from_pretrained(str(tmp_path / "given")).classes == model.classes
