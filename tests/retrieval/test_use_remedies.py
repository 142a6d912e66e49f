"""What sentences of embed, index, search, serve, export and the hub say to do leads out: a wrong command or call, its
sentence, and one that follows it. {} in a command is the folder of what `place` has made."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from cmgan_dist.errors import BadInput
from cmgan_dist.report.run import write_report
from cmgan_dist.retrieval.index import Index
from cmgan_dist.retrieval.metrics import Embeddings, common_space
from cmgan_dist.retrieval.model import Model, load_model
from cmgan_dist.retrieval.pictures import FolderPictures
from launchers import embed, evaluate, index, search, serve
from tests.retrieval.embed_cases import raw_run
from tests.retrieval.serve_cases import HueModel, colour, hue_index, running
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


ROWS = np.eye(2, 12, dtype=np.float32)
Call = Callable[[Model, Index], object]
CALLS: list[tuple[Call, str, Call]] = [
    (lambda m, _: m.encode_texts(b"a dog"), "is bytes: decode it first", lambda m, _: m.encode_texts("a dog")),
    (
        lambda m, _: m.encode_texts(Path(__file__)),
        "is the path .*: read it first",
        lambda m, _: m.encode_texts(Path(__file__).read_text()),
    ),
    (lambda m, _: m.encode_texts(["a", " "]), "text 1 is ' ': give a text", lambda m, _: m.encode_texts(["a", "b"])),
    (
        lambda m, _: m.encode_texts(["\ud800"]),
        "has half a character, a lone surrogate: mend it",
        lambda m, _: m.encode_texts(["\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]),
    ),
    (
        lambda m, _: m.encode_texts("a", batch=0),
        "batch is 0, expected a whole number above 0",
        lambda m, _: m.encode_texts("a", batch=1),
    ),
    (
        lambda m, _: m.encode_texts(["a", ""], on_error="pass"),  # type: ignore[call-overload]
        "expected 'raise' or 'skip'",
        lambda m, _: m.encode_texts(["a", ""], on_error="skip"),
    ),
    (
        lambda m, _: m.encode_images(3),  # type: ignore[call-overload]
        "3 cannot be encoded: give an item, or several in a list",
        lambda m, _: (m.encode_images(picture(1)), m.encode_images([picture(1), picture(2)])),
    ),
    (
        lambda m, _: m.encode_images("none.png"),
        "image 0 .*cannot be read .*: name a picture",
        lambda m, _: m.encode_images([picture(3)]),
    ),
    (
        lambda m, _: m.encode_images([picture(1), b"no picture"]),
        "image 1.*; give another picture",
        lambda m, _: m.encode_images([picture(1), picture(2)]),
    ),
    (lambda _, i: i.search(i.vector(0), k=0), "a whole number of at least 1", lambda _, i: i.search(i.vector(0), k=1)),
    (
        lambda _, i: i.search(i.vector(0), modality="sound"),
        "it must be image or text",
        lambda _, i: [i.search(i.vector(0), modality=name) for name in ("image", "text")],
    ),
    (
        lambda _, i: i.search(i.vector(0), classes="class 0"),
        "give a list of names",
        lambda _, i: i.search(i.vector(0), classes=["class 0"]),
    ),
    (
        lambda _, i: i.search(i.vector(0), classes=["klass 0"]),
        "has no class 'klass 0': .*'class 0'",
        lambda _, i: i.search(i.vector(0), classes=["class 0"]),
    ),
    (
        lambda m, i: i.search("a dog"),  # type: ignore[arg-type]
        "encode it first, by the index's model",
        lambda m, i: i.search(m.encode_texts("a dog")),
    ),
    (
        lambda m, i: i.search(np.zeros(3)),
        "the query has shape .*: encode it by the index's model",
        lambda m, i: i.search(m.encode_texts("a dog")),
    ),
    (
        lambda m, i: i.search(i.vector(0) * np.nan),
        "the query holds NaN or Inf: give finite numbers",
        lambda m, i: i.search(np.nan_to_num(i.vector(0) * np.nan)),
    ),
    (lambda _, i: i.get(10**6), "item 1000000 is not in .*: name one that is", lambda _, i: i.get(0)),
    (
        lambda _, i: i.get("0"),  # type: ignore[arg-type]
        "give a whole number, as a hit has it",
        lambda _, i: i.get(i.search(i.vector(0))[0][0].id),
    ),
    (lambda _, i: i.remove("test0"), "give a list of ids or keys", lambda _, i: i.remove(["test0"])),
    (
        lambda _, i: Index.build(i.folder.parent / "emb", i.folder.parent / "new", kind="flat"),
        "kind is 'flat': it must be auto, exact or ivf_sq8",
        lambda _, i: [
            Index.build(i.folder.parent / "emb", i.folder.parent / kind, kind=kind) for kind in ("auto", "exact")
        ],
    ),
    (
        lambda m, _: load_model(m.saved.folder, "abacus"),
        "which is not here .*: give 'cpu' or 'auto'",
        lambda m, _: [load_model(m.saved.folder, device) for device in ("cpu", "auto")],
    ),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), CALLS, ids=range(len(CALLS)))
def test_a_call(wrong: Call, sentence: str, right: Call, whole: Path, tmp_path: Path) -> None:
    for name in ("emb", "index"):
        shutil.copytree(whole / name, tmp_path / name)
    model, opened = load_model(whole / "run", "cpu"), Index.open(tmp_path / "index")
    with pytest.raises(BadInput, match=sentence):
        wrong(model, opened)
    right(model, opened)


def test_features_to_encode(whole: Path) -> None:
    model = load_model(whole / "features-run", "cpu")
    for wrong, sentence in (
        (ROWS[0], "expected .*: give a row for each item"),
        (ROWS * np.nan, "the features hold NaN or Inf: give finite numbers"),
        (ROWS[:, :3], r"expected \[n, 12\]: give those of the kind that the model was trained on"),
    ):
        with pytest.raises(BadInput, match=sentence):
            model.encode_images(wrong)
        assert model.encode_images(ROWS).shape == (2, model.dim)


def test_nothing_would_be_left_of_an_index(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "index", tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    with pytest.raises(BadInput, match=f"nothing would be left of the index {tmp_path / 'index'}: remove the folder"):
        opened.remove(range(len(opened)))
    shutil.rmtree(tmp_path / "index")


def test_embeddings_to_measure() -> None:
    pair, owner = torch.eye(2), torch.arange(2)
    for wrong, sentence in (
        (lambda: Embeddings(pair[0], pair, owner, None), r"expected \[items, dimensions\]: give a row for each"),
        (lambda: Embeddings(pair * torch.nan, pair, owner, None), "NaN or Inf: use a model that has not diverged"),
        (lambda: Embeddings(pair, pair, owner + 1, None), "must give one of 2 images for each of 2 texts"),
        (lambda: Embeddings(pair, pair, owner, pair[:1]), r"expected \[2, classes\]: give a row for each image"),
        (lambda: common_space(Embeddings(pair, pair[:, :1], owner, None)), "project them first"),
        (lambda: common_space(Embeddings(2 * pair, pair, owner, None), "inner"), "score by cosine, or give vectors"),
    ):
        with pytest.raises(BadInput, match=sentence):
            wrong()
    for score in ("cosine", "inner"):
        common_space(Embeddings(pair, pair, owner, pair), score)
    common_space(Embeddings(2 * pair, pair, owner, None), "cosine")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-99])


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


EMBED, INDEX = f"{DATA}/emb --splits test", "index {}/emb --output {}/index"
DAMAGES: list[tuple[str, Callable[[Path], None], str, str, str]] = [
    ("emb/test-000000.image.npy", Path.unlink, INDEX, "is missing: embed again", EMBED),
    ("emb/test-000000.text.npy", cut, INDEX, "bytes, its record says .*: embed again, which makes it anew", EMBED),
    ("emb/test-000000.items.parquet", flipped, INDEX, "is damaged: embed again, which makes it anew", EMBED),
    ("emb/test-000000.record.json", Path.unlink, INDEX, "missing or damaged: embed again", EMBED),
    ("emb/embeddings.json", Path.unlink, INDEX, r"make it by launchers/embed\.py", EMBED),
    ("index/vectors.npy", Path.unlink, f"{SEARCH} dog", "is missing, but named in index.json: .* index again", INDEX),
    ("index/vectors.npy", cut, f"{SEARCH} dog", "is damaged .*: restore it or index again", INDEX),
    ("index/items.parquet", flipped, f"{SEARCH} dog", r"another checksum\): restore it or index again", INDEX),
    ("index/items.parquet", in_a_circle, f"{SEARCH} dog", "cannot be read .*: restore it or index again", INDEX),
]


@pytest.mark.parametrize(("name", "damage", "reader", "sentence", "maker"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_file_that_is_made_again(
    name: str, damage: Callable[[Path], None], reader: str, sentence: str, maker: str, whole: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(whole, place)
    damage(place / name)
    code, said = told(place, reader)
    assert (code, bool(re.search(sentence, said))) == (2, True), said
    assert told(place, maker) == (0, "")
    assert told(place, reader) == (0, "")


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("model.safetensors", flipped, r"is damaged: its checksum is not in model\.json: restore the best/ folder"),
        ("vocabulary.json", Path.unlink, r"is missing, but named in model\.json: restore the best/ folder"),
        ("config.yaml", in_a_circle, "cannot be read .*: make it readable, or restore it"),
        ("model.json", cut, "model.json is damaged .*: restore the best/ folder or train again"),
    ],
)
def test_a_model_that_is_restored(
    name: str, damage: Callable[[Path], None], sentence: str, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    damage(run / "best" / name)
    with pytest.raises(BadInput, match=sentence):
        load_model(run, "cpu").encode_texts("a dog")
    (run / "best" / name).unlink(missing_ok=True)
    shutil.copy(whole / "run" / "best" / name, run / "best" / name)
    load_model(run, "cpu").encode_texts("a dog")


def test_a_question_to_a_server(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    served = running(hue_index(folder), HueModel(), FolderPictures(folder))
    form, path = {"files": {"image": ("x.png", colour(0.1))}}, "/api/search"
    right: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", path, form),
        ("GET", path, {"params": {"text": "red"}}),
        ("GET", "/api/browse", {}),
    ]
    with served as address, httpx2.Client(base_url=address, timeout=30) as client:
        for method, where, request, sentence, follows in (
            ("GET", path, {"params": {"text": "red", "picture": "a"}}, "search by one of them", 1),
            ("GET", path, {}, r"give \?text=, or POST a picture", 0),
            ("GET", path, {}, r"give \?text=, or POST a picture", 1),
            ("GET", path, {"params": {"text": " "}}, "text is empty: give some words", 1),
            ("GET", path, {"params": {"text": "red" * 10_000}}, "give at most", 1),
            ("GET", path, {"params": {"words": "red"}}, "there is no parameter 'words' here: known are .*text", 1),
            ("GET", path, {"params": [("text", "red"), ("text", "blue")]}, "given 2 times: give it once", 1),
            ("GET", path, {"params": {"picture": "gone"}}, "does not know this picture any more: give it again", 0),
            ("POST", path, {"content": b"x"}, "send the picture as the form field 'image'", 0),
            ("POST", path, {"files": {"photo": ("x.png", colour(0.1))}}, "form field 'image' .* is missing: send", 0),
            ("POST", path, {"files": {"image": ("x.png", b"x")}}, "give another picture", 0),
            (
                "POST",
                path,
                {"content": b"--a", "headers": {"content-type": "multipart/form-data; boundary=b"}},
                "send the picture again",
                0,
            ),
            ("GET", "/api/similar/9999", {}, "item 9999 is not in the index: browse for those that are", 2),
        ):
            answer = client.request(method, where, **request)
            assert answer.status_code in (400, 404, 422), answer.text
            assert re.search(sentence, answer.json()["error"]), answer.text
            method, where, request = right[follows]
            assert client.request(method, where, **request).status_code == 200


def not_a_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_a_report_that_is_drawn_again(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "features-run", run)
    words = f"evaluate {run} --data {{}}/features --no-baselines"
    again: list[tuple[str, Callable[[Path], object], str]] = [
        ("evaluation.json", cut, "is not as it was written .*: evaluate the run again"),
        ("embeddings.npz", lambda path: path.write_bytes(b"PK"), "is not a file of embeddings .*: evaluate the run"),
    ]
    assert told(whole, words) == (0, "")
    for name, damage, sentence in again:
        damage(run / name)
        with pytest.raises(BadInput, match=sentence):
            write_report(run)
        assert told(whole, words) == (0, "")
        write_report(run)
    for name in ("embeddings.npz", "evaluation.json", "report.html"):
        not_a_file(run / name)
        code, said = told(whole, f"{words} --again")
        assert (code, bool(re.search(f"{name} .*is no file: move it away", said))) == (2, True), said
        (run / name).rmdir()
        assert told(whole, f"{words} --again") == (0, "")
