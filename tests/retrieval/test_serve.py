"""The JSON API over a stand-in index: what it answers, what it refuses, and that it goes on after each."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.origin import origin_of
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.retrieval.answers import chosen_classes
from cmgan_dist.retrieval.connections import listen
from cmgan_dist.retrieval.pictures import ByteCache, FolderPictures, ShardPictures, open_pictures, thumbnail
from cmgan_dist.retrieval.serve import Limits
from tests.retrieval.serve_cases import (
    CLASSES,
    HOSTILE,
    Hit,
    HueModel,
    MemoryIndex,
    colour,
    empty_png,
    encoded,
    error_of,
    hue_index,
    running,
)
from tests.toy import ROOT, environment, make_features, make_raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "pictures"


@pytest.fixture(scope="module")
def index(folder: Path) -> MemoryIndex:
    return hue_index(folder)


@pytest.fixture(scope="module")
def client(index: MemoryIndex, folder: Path) -> Iterator[httpx2.Client]:
    served = running(index, HueModel(), FolderPictures(folder), title="Hues", attribution="Drawn here")
    with served as address, httpx2.Client(base_url=address, timeout=30) as client:
        yield client


def upload(client: httpx2.Client, data: bytes, **parameters: object) -> httpx2.Response:
    return client.post("/api/search", files={"image": ("x.png", data)}, params=parameters)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- answers


def test_a_text_finds_both_best_first_with_scores_against_chance(client: httpx2.Client, index: MemoryIndex) -> None:
    found = client.get("/api/search", params={"text": " green ", "k": 6}).json()
    assert found["query"] == {"text": "green"}
    assert found["near"] is True
    query = HueModel().encode_texts(["green"])[0]
    expected = sorted(range(len(index)), key=lambda i: (-float(query @ index.vectors[i]), i))[:6]
    assert [hit["id"] for hit in found["hits"]] == expected
    for hit in found["hits"]:
        assert hit["score"] == pytest.approx(float(query @ index.vectors[hit["id"]]), abs=1e-6)
        assert hit["above_chance"] == pytest.approx(hit["score"] / 0.3, abs=1e-5)
        assert hit["labels"] == list(index.hits[hit["id"]].labels)
        assert hit["picture"] == index.hits[hit["id"]].owner
    assert {hit["modality"] for hit in found["hits"]} == {"image", "text"}


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_modality_and_classes_are_kept_to(client: httpx2.Client, modality: str) -> None:
    parameters = {"text": "green", "k": 100, "modality": modality, "classes": "warm"}
    hits = client.get("/api/search", params=parameters).json()["hits"]
    assert len(hits) == 20  # a third of 60 are red or yellow
    assert {(hit["modality"], *hit["labels"]) for hit in hits} == {(modality, "warm")}
    each = client.get("/api/search", params={"text": "green", "k": 7, "modality": "each"}).json()["hits"]
    assert [hit["modality"] for hit in each] == ["image"] * 7 + ["text"] * 7


def test_classes_come_one_by_one_or_between_commas() -> None:
    assert chosen_classes([], CLASSES) is None
    assert chosen_classes([""], CLASSES) is None
    assert chosen_classes(["warm, cold", "warm"], CLASSES) == ["warm", "cold"]
    assert chosen_classes([CLASSES[2]], CLASSES) == [CLASSES[2]]
    with pytest.raises(BadInput, match="class 'hot' is unknown"):
        chosen_classes(["warm,hot"], CLASSES)


def test_what_is_far_from_all_is_said_to_be(client: httpx2.Client) -> None:
    found = client.get("/api/search", params={"text": "quarterly report"}).json()
    assert found["near"] is False
    assert len(found["hits"]) == 20


def test_a_picture_finds_its_like_and_is_known_by_a_token(client: httpx2.Client) -> None:
    data = colour(0.5, format="WEBP")
    found = upload(client, data, k=3, modality="image").json()
    assert [hit["id"] // 2 for hit in found["hits"]] == [30, 29, 31]
    again = client.get("/api/search", params={**found["query"], "k": 3, "modality": "image"}).json()
    assert again == found
    shown = client.get(f"/api/picture/{found['query']['picture']}")
    assert Image.open(io.BytesIO(shown.content)).getpixel((5, 5)) == pytest.approx((0, 255, 255), abs=4)


def test_similar_items_are_others(client: httpx2.Client) -> None:
    found = client.get("/api/similar/40", params={"k": 4, "modality": "image"}).json()
    assert found["query"]["item"]["id"] == 40
    assert [hit["id"] for hit in found["hits"]] == [38, 42, 36, 44]
    assert len(client.get("/api/similar/40", params={"k": 200}).json()["hits"]) == 119


def test_browsing_goes_through_all(client: httpx2.Client) -> None:
    seen: list[int] = []
    while True:
        page = client.get("/api/browse", params={"offset": len(seen), "limit": 7, "modality": "text"}).json()
        seen += [hit["id"] for hit in page["hits"]]
        if len(seen) >= page["total"]:
            break
    assert seen == list(range(1, 120, 2))
    assert client.get("/api/browse", params={"classes": "warm"}).json()["total"] == 40
    assert client.get("/api/browse", params={"offset": 10**9}).json()["hits"] == []


def test_info_says_what_there_is(client: httpx2.Client) -> None:
    info = client.get("/api/info").json()
    assert info["counts"] == {"image": 60, "text": 60}
    assert info["classes"] == CLASSES
    assert info["attribution"] == "Drawn here"
    assert info["chance"] == {"mean": 0.0, "std": 0.3}


def test_a_thumbnail_is_made_once_and_asked_for_by_etag(client: httpx2.Client) -> None:
    first = client.get("/api/thumbnail/20")
    assert first.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(first.content)).size == (64, 48)
    again = client.get("/api/thumbnail/20", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    small = client.get("/api/thumbnail/20", params={"size": 32})
    assert Image.open(io.BytesIO(small.content)).size == (32, 24)
    assert small.headers["etag"] != first.headers["etag"]


def test_every_answer_forbids_other_hosts(client: httpx2.Client) -> None:
    for path in ("/", "/api/info", "/api/thumbnail/0", "/static/search.js", "/api/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:"), path


def test_hostile_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    index = hue_index(tmp_path / "pictures", 4)
    index.classes = [HOSTILE]
    with running(index, HueModel(), title=HOSTILE, attribution=HOSTILE) as address:
        page = httpx2.get(address).text
        assert "<img" not in page.replace('<img id="query-picture"', "")
        assert "<script>" not in page
        assert page.count("&lt;script&gt;") == 5  # title twice, class twice, attribution
        answer = httpx2.get(f"{address}/api/browse", params={"modality": "text"})
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["hits"][3]["texts"] == [HOSTILE]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "parameters", "status", "words"),
    [
        ("/api/search", {"text": "  "}, 400, "text is empty"),
        ("/api/search", {}, 400, "text is missing"),
        ("/api/search", {"text": "red", "limit": 3}, 400, "there is no parameter 'limit' here: known are classes, k"),
        ("/api/browse", {"k": 3}, 400, "there is no parameter 'k' here: known are classes, limit, modality, offset"),
        ("/api/info", {"text": "red"}, 400, "there is no parameter 'text' here: known are none"),
        ("/api/search", {"text": ["red", "green"]}, 400, "text is given 2 times: give it once"),
        ("/api/search", {"text": "red", "k": [1, 1, 2]}, 400, "k is given 3 times"),
        ("/api/search", {"text": "red", "modality": ["image", "text"]}, 400, "modality is given 2 times"),
        ("/api/similar/1", {"k": [1, 2]}, 400, "k is given 2 times"),
        ("/api/browse", {"limit": [1, 2]}, 400, "limit is given 2 times"),
        ("/api/thumbnail/0", {"size": [64, 128]}, 400, "size is given 2 times"),
        ("/api/search", {"text": "x" * 2001}, 400, "text has 2001 characters"),
        ("/api/search", {"text": "red", "k": 0}, 400, "k is '0'"),
        ("/api/search", {"text": "red", "k": 201}, 400, "k is '201'"),
        ("/api/search", {"text": "red", "k": "many"}, 400, "k is 'many'"),
        ("/api/search", {"text": "red", "classes": "hot"}, 400, "class 'hot' is unknown"),
        ("/api/search", {"text": "red", "modality": "sound"}, 400, "modality is 'sound'"),
        ("/api/search", {"picture": "0" * 32}, 404, "does not know this picture"),
        ("/api/similar/120", {}, 404, "item 120 is not in the index"),
        ("/api/similar/-1", {}, 400, "id is '-1'"),
        ("/api/similar/1e3", {}, 400, "id is '1e3'"),
        (f"/api/similar/{10**30}", {}, 400, "id is"),
        ("/api/browse", {"offset": -1}, 400, "offset is '-1'"),
        ("/api/browse", {"classes": "hot"}, 400, "class 'hot' is unknown"),
        ("/api/thumbnail/120", {}, 404, "item 120 is not in the index"),
        ("/api/thumbnail/0", {"size": 513}, 400, "size is '513'"),
        ("/api/picture/..", {}, 404, "nothing at this address"),
        ("/api/nothing", {}, 404, "nothing at this address"),
    ],
)
def test_wrong_questions_get_one_sentence(
    client: httpx2.Client, path: str, parameters: dict[str, object], status: int, words: str
) -> None:
    sentence = error_of(client.get(path, params=parameters), status)  # type: ignore[arg-type]
    assert words in sentence
    assert "\n" not in sentence
    assert client.get("/api/search", params={"text": "red"}).status_code == 200


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is no JPEG, PNG or WebP"),
        (b"GIF89a" + bytes(100), "it is no JPEG, PNG or WebP"),
        (colour(0.2)[:60], "does not decode"),
        (colour(0.2, (400, 400), "JPEG")[:700], "does not decode"),
        (empty_png(10_000, 10_000), "10000 x 10000 pixels, more than"),
        (empty_png(20_000, 20_000), "more than 51000000 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no JPEG, PNG or WebP"),
    ],
    ids=["empty", "gif", "cut png", "cut jpeg", "large", "bomb", "svg"],
)
def test_wrong_pictures_get_one_sentence(client: httpx2.Client, data: bytes, words: str) -> None:
    assert words in error_of(upload(client, data), 400)
    assert upload(client, colour(0.1)).status_code == 200


def test_wrong_forms_get_one_sentence(client: httpx2.Client) -> None:
    def post(**request: object) -> str:
        return error_of(client.post("/api/search", **request), 400)  # type: ignore[arg-type]

    assert "no multipart/form-data" in post(content=colour(0.1))
    assert "'image' with a picture is missing" in post(files={"file": ("x.png", colour(0.1))})
    assert "cannot be read" in post(content=b"junk", headers={"Content-Type": "multipart/form-data"})
    assert "cannot be read" in post(content=b"junk", headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert error_of(client.put("/api/search"), 405)
    assert upload(client, colour(0.1)).status_code == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_large_upload_is_refused_while_it_is_read(client: httpx2.Client, told: bool) -> None:
    """100 MB, with or without a length in the header; the server runs in this process."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
    block, blocks = bytes(1 << 20), 100
    before = most = psutil.Process().memory_info().rss

    def body() -> Iterator[bytes]:
        nonlocal most
        yield head
        for _ in range(blocks):
            yield block
            most = max(most, psutil.Process().memory_info().rss)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if told:
        headers["Content-Length"] = str(len(head) + blocks * len(block))
    answer = client.post("/api/search", content=body(), headers=headers)
    assert "more than 10 MB" in error_of(answer, 413)
    assert most - before < 30 << 20
    assert upload(client, colour(0.1)).status_code == 200


def test_an_upload_that_does_not_come_is_given_up(index: MemoryIndex) -> None:
    def never() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
        threading.Event().wait(0.6)
        yield b"late"

    with running(index, HueModel(), limits=Limits(upload_seconds=0.2)) as address:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = httpx2.post(f"{address}/api/search", content=never(), headers=headers)
        assert "took more than" in error_of(answer, 408)


# ---------------------------------------------------------------------------------------------- many at once


def test_fifty_clients_at_once_lose_nothing(index: MemoryIndex, folder: Path) -> None:
    model = HueModel(0.002)
    with running(index, model, FolderPictures(folder)) as address, ThreadPoolExecutor(50) as pool:

        def one(number: int) -> list[int]:
            with httpx2.Client(base_url=address, timeout=60) as client:
                found = upload(client, colour(number / 50), k=1, modality="image").json()["hits"]
                text = client.get("/api/search", params={"text": f"red {number}", "k": 1}).json()["hits"]
                assert client.get(f"/api/thumbnail/{number * 2}").status_code == 200
                return [found[0]["id"] // 2, text[0]["id"]]

        answers = list(pool.map(one, range(50)))
    assert [picture for picture, _ in answers] == [round(number / 50 * 60) % 60 for number in range(50)]
    assert {text for _, text in answers} == {0}
    assert model.most_at_once == 1
    assert model.encoded == 101  # and the first text, which reads the backbone


def test_too_many_are_told_to_come_again(index: MemoryIndex) -> None:
    with running(index, HueModel(0.1), limits=Limits(waiting=4)) as address, ThreadPoolExecutor(20) as pool:

        def ask(number: int) -> httpx2.Response:
            return httpx2.get(f"{address}/api/search", params={"text": f"red {number}"}, timeout=30)

        answers = list(pool.map(ask, range(20)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert 0 < len(refused) <= 16
        assert "busy" in error_of(refused[0], 503)
        assert refused[0].headers["retry-after"]
        assert {answer.status_code for answer in answers} == {200, 503}
        assert ask(99).status_code == 200


def test_who_waits_too_long_is_told_to_come_again(index: MemoryIndex) -> None:
    limits = Limits(waiting_seconds=0.1)
    with running(index, HueModel(0.4), limits=limits) as address, ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> httpx2.Response:
            return httpx2.get(f"{address}/api/search", params={"text": f"red {number}"}, timeout=30)

        answers = list(pool.map(ask, range(4)))
        assert {answer.status_code for answer in answers} == {200, 503}
        assert ask(99).status_code == 200


def test_a_failure_of_the_server_is_told_and_it_goes_on(index: MemoryIndex) -> None:
    model = HueModel()
    model.encode_images = lambda images: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with running(index, model) as address, httpx2.Client(base_url=address, timeout=60) as client:
        assert "the server failed" in error_of(upload(client, colour(0.1)), 500)
        assert client.get("/api/search", params={"text": "red"}).status_code == 200


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "key",
    ["../secret.png", "/etc/passwd", "inside/../../secret.png", "link.png", "links/secret.png", "a\0.png", "", "."],
)
def test_no_key_leads_out_of_the_folder(tmp_path: Path, key: str) -> None:
    root = tmp_path / "pictures"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(colour(0.1))
    (root / "good.png").write_bytes(colour(0.2))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "links").symlink_to(tmp_path)
    (root / "alias.png").symlink_to(root / "good.png")
    pictures = FolderPictures(root)
    with pytest.raises(BadSample, match="not in the folder"):
        pictures.read("", 0, key)
    assert pictures.read("", 0, "good.png") == pictures.read("", 0, "alias.png") == colour(0.2)
    secret = Hit(0, 0.0, "image", key, None, (), (), "pictures-000000", 0, 0)
    with running(MemoryIndex(np.ones((1, 3), np.float32), [secret], []), HueModel(), pictures) as address:
        assert "no picture to show" in error_of(httpx2.get(f"{address}/api/thumbnail/0"), 404)
        assert httpx2.get(f"{address}/api/thumbnail/../../etc/passwd").status_code == 404
        assert httpx2.get(f"{address}/static/../serve.py").status_code == 404
        assert httpx2.get(f"{address}/static/%2e%2e/serve.py").status_code == 404


def test_a_pipe_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("private")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for key in ("pipe.png", "folder.png", "notes.txt", "loop.png", "gone.png"):
        with pytest.raises(BadSample, match="not in the folder"):
            FolderPictures(tmp_path).read("", 0, key)


def test_pictures_and_texts_of_shards_come_by_shard_and_row(tmp_path: Path) -> None:
    data = make_raw(tmp_path / "raw")
    pictures = open_pictures("shards", str(data))
    assert pictures is not None
    for split in ("train", "val"):
        reader = ShardReader(str(data), split)
        for number, shard in enumerate(reader.shards):
            row = shard.samples - 1
            sample = reader.read(number, row)
            for name in (shard.name, shard.name.removesuffix(".tar")):
                assert pictures.read(name, row, sample.key) == sample.image
                assert pictures.texts(name, row, sample.key) == sample.texts
            for wrong in ((shard.name, row, "other"), (shard.name, row + 1, sample.key), (shard.name, -1, sample.key)):
                with pytest.raises(BadSample):
                    pictures.read(*wrong)
                assert pictures.texts(*wrong) == []
    with pytest.raises(BadSample, match="no shard"):
        pictures.read("../raw/train-000000", 0, "x")


def test_where_pictures_are_looked_for(tmp_path: Path) -> None:
    features = make_features(tmp_path / "features")
    assert open_pictures("texts", "") is None
    assert open_pictures("pictures", str(tmp_path / "gone")) is None
    assert open_pictures("shards", str(tmp_path / "gone")) is None
    assert open_pictures("shards", str(features)) is None
    raw = make_raw(tmp_path / "raw")
    assert isinstance(open_pictures("shards", str(features), str(raw)), ShardPictures)
    with pytest.raises(BadInput, match="holds no encoded pictures"):
        open_pictures("shards", str(raw), str(features))
    with pytest.raises(BadInput, match="does not exist"):
        open_pictures("shards", str(raw), str(tmp_path / "gone"))
    details = json.dumps(origin_of(str(raw), load_manifest(raw)))
    text = (features / "manifest.json").read_text().replace('"details": {}', f'"details": {details}')
    (features / "manifest.json").write_text(text)
    assert isinstance(open_pictures("shards", str(features)), ShardPictures)


def test_without_raw_data_there_are_texts_alone(index: MemoryIndex) -> None:
    with running(index, HueModel()) as address:
        hits = httpx2.get(f"{address}/api/search", params={"text": "red"}).json()["hits"]
        assert {hit["picture"] for hit in hits} == {None}
        assert "the raw data are not here" in error_of(httpx2.get(f"{address}/api/thumbnail/0"), 404)


def test_a_thumbnail_is_upright_on_white_and_small() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter to see it upright
    lying = Image.new("RGB", (400, 200), "red")
    lying.paste("blue", (0, 0, 200, 200))
    for format in ("JPEG", "PNG", "WEBP"):
        small = Image.open(io.BytesIO(thumbnail(encoded(lying, format, exif=exif), 100)))
        assert small.size == (50, 100)
        assert small.getpixel((25, 20)) == pytest.approx((0, 0, 254), abs=8)  # what was left is above
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    for image in (clear, clear.convert("LA"), Image.new("P", (30, 30), 0), Image.new("I;16", (30, 30), 65535)):
        small = Image.open(io.BytesIO(thumbnail(encoded(image, **({"transparency": 0} if image.mode == "P" else {})))))
        assert small.convert("RGB").getpixel((9, 9)) == pytest.approx((255, 255, 255), abs=2), image.mode


def test_the_cache_keeps_what_was_used_last_up_to_its_bound() -> None:
    cache, made = ByteCache(100), []

    def get(key: str) -> None:
        cache.get(key, lambda: made.append(key) or bytes(40))  # type: ignore[func-returns-value]

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "b"]
    assert cache.held == 80
    assert cache.get("large", lambda: bytes(1000))[0] == bytes(1000)
    assert cache.held == 0


# ---------------------------------------------------------------------------------------------- launcher


def test_a_port_in_use_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(BadInput, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])
    with pytest.raises(BadInput, match="--host"):
        listen("nowhere.invalid", 0)
    with pytest.raises(BadInput, match="--port"):
        listen("127.0.0.1", 70_000)


def launched(folder: Path, *words: str) -> subprocess.Popen[str]:
    """launchers/serve.py over the pictures of hues, on a free port."""
    command = [sys.executable, "-m", "tests.retrieval.serve_worker", str(folder), "INDEX", "--port", "0", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_tells_its_address_and_stops_cleanly(tmp_path: Path, number: int) -> None:
    with launched(tmp_path / "pictures", "--title", "Twelve") as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        assert "Twelve" in httpx2.get(address, timeout=30).text
        assert len(httpx2.get(f"{address}/api/search", params={"text": "red"}, timeout=30).json()["hits"]) == 20
        assert httpx2.get(f"{address}/api/thumbnail/0", timeout=30).status_code == 200
        process.send_signal(number)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "")
    assert re.fullmatch(r"\[.*INFO +\d+ threads? a process \([^()]*\)\s*", errors, re.DOTALL), errors


@pytest.mark.process
def test_the_launcher_refuses_another_model(tmp_path: Path) -> None:
    with launched(tmp_path / "pictures", "--run", "other") as process:
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest) == (2, "")
    assert errors.endswith("error: INDEX was made with another model than other: embed and index again\n")
