"""The server among strangers: pictures made to stop it, forms, connections that say nothing, data that go away."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from cmgan_dist.data.image import decode_image
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.retrieval.connections import hosts_of, listen
from cmgan_dist.retrieval.pictures import FolderPictures, ShardPictures, thumbnail
from cmgan_dist.retrieval.serve import Limits
from cmgan_dist.retrieval.upload_decoder import Decoder, scans_of
from tests.retrieval.serve_cases import (
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
from tests.toy import ROOT, environment, make_raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "pictures"


@pytest.fixture(scope="module")
def index(folder: Path) -> MemoryIndex:
    return hue_index(folder)


@pytest.fixture(scope="module")
def client(index: MemoryIndex, folder: Path) -> Iterator[httpx2.Client]:
    served = running(index, HueModel(), FolderPictures(folder))
    with served as address, httpx2.Client(base_url=address, timeout=60) as client:
        yield client


def upload(client: httpx2.Client, data: bytes) -> httpx2.Response:
    return client.post("/api/search", files={"image": ("x.png", data)})


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that says its last scan again and again."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + b"\xff\xd9"


def damaged_png() -> bytes:
    """A PNG whose pixels end half-way, which Pillow finds when it is asked for the orientation."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    data = bytearray(encoded(noise))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (many_scans(64, 500), "scans"),
        (encoded(Image.new("1", (8000, 7000))), "8000 x 7000 pixels, more than"),
        (empty_png(45_000_000, 1, 16, 6), "more than the 25000000 of PNG"),
        (damaged_png(), "does not decode"),
    ],
    ids=["scans", "pixels", "wide", "damaged"],
)
def test_pictures_that_cost_too_much_are_refused(client: httpx2.Client, data: bytes, words: str) -> None:
    assert words in error_of(upload(client, data), 400)
    assert upload(client, colour(0.1)).status_code == 200


def test_a_damaged_png_has_no_thumbnail() -> None:
    with pytest.raises(BadSample, match="does not decode"):
        thumbnail(damaged_png())
    with pytest.raises(BadSample, match="89000000 x 1 pixels, more than"):
        thumbnail(empty_png(89_000_000, 1, 8, 6))


def test_real_progressive_pictures_are_taken(client: httpx2.Client) -> None:
    rgb = Image.new("RGB", (300, 200), "lime")
    for options in ({"progressive": True}, {"progressive": True, "subsampling": 0}, {}):
        found = upload(client, encoded(rgb, "JPEG", **options)).json()
        assert "green" in " ".join(found["hits"][0]["texts"]) or found["hits"][0]["modality"] == "image"
        assert found["hits"][0]["row"] in (19, 20, 21)


def test_scans_are_counted_as_a_decoder_meets_them() -> None:
    for options, scans in (({}, 1), ({"progressive": True}, 10)):
        assert scans_of(encoded(Image.new("RGB", (64, 64)), "JPEG", **options)) == scans  # libjpeg's own script has 10
    comment = b"\xff\xda" * 200  # in a segment, as a camera's small picture is
    picture = encoded(Image.new("RGB", (64, 64)), "JPEG", comment=comment)
    assert scans_of(picture + b"\xff\xda" * 200) == 1  # what follows the end is another thing, such as a film
    assert scans_of(picture[:-2] + b"\xff\xff\xda\0\2" * 200) == 201
    assert scans_of(b"\xff\xd8\xff\xda") == 1
    assert scans_of(encoded(Image.new("RGB", (64, 64)))) == 0


@pytest.mark.process
def test_a_decoder_gives_the_pixels_that_a_model_sees_and_outlives_its_worker() -> None:
    decoder = Decoder(48)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(noise, format)
        made = decoder.decode(data)
        assert np.array_equal(decode_image(made.square, 48)[..., :3], decode_image(data, 48)[..., :3])
        assert made.thumbnail == thumbnail(data)
        decoder.start().kill()
    with pytest.raises(BadSample, match="no JPEG"):
        decoder.decode(b"")
    decoder.close()
    assert decoder._worker is not None
    assert decoder._worker.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="closed"):
        decoder.decode(b"")


FORKED = """
import os, signal
from cmgan_dist.retrieval import upload_decoder as decoder
decoder.SECONDS = 1

def spin(data, size):
    while True: pass

def crash(data, size):
    os.kill(os.getpid(), signal.SIGSEGV)

for decoder.decoded in (spin, crash, lambda data, size: bytearray(2 * decoder.MEMORY_BYTES), lambda data, size: 1 / 0):
    print(decoder._in_a_fork(b"", 1)[9:].decode())
"""


@pytest.mark.process
def test_a_picture_that_takes_all_it_can_is_ended() -> None:
    command = [sys.executable, "-c", FORKED]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.splitlines() == [
        "decoding the picture takes more than 6 s",
        "decoding the picture fails",
        "decoding the picture takes too much memory",
        "decoding the picture fails",
    ]
    assert "ZeroDivisionError" in ran.stderr


# ---------------------------------------------------------------------------------------------- data that go away


@pytest.mark.parametrize("gone", ["*", "*.npz", "*.tar"])
def test_a_data_set_that_is_deleted_leaves_texts_and_keys(tmp_path: Path, gone: str) -> None:
    data = make_raw(tmp_path / "raw")
    pictures = ShardPictures(str(data))
    reader = ShardReader(str(data), "train")
    shard, (key, _) = reader.shards[0].name, reader.raw(0, 0)
    for path in data.glob(gone):
        path.unlink()
    hit = Hit(0, 0.0, "image", key, None, (), (), shard, 0, 0)
    with running(MemoryIndex(np.ones((1, 3), np.float32), [hit], []), HueModel(), pictures) as address:
        for asked in ("/api/search?text=red", "/api/similar/0", "/api/browse"):
            answer = httpx2.get(address + asked)
            assert answer.status_code == 200, answer.text
            for found in answer.json()["hits"]:
                assert (found["key"], found["texts"]) == (key, [])
                assert gone != "*" or found["picture"] is None
        sentence = error_of(httpx2.get(f"{address}/api/thumbnail/0"), 404)
        assert "no picture to show" in sentence
        assert str(tmp_path) not in sentence


def test_a_folder_that_is_deleted_leaves_texts_and_keys(tmp_path: Path) -> None:
    index = hue_index(tmp_path / "pictures", 6)
    with running(index, HueModel(), FolderPictures(tmp_path / "pictures")) as address:
        assert httpx2.get(f"{address}/api/browse").json()["hits"][0]["picture"] == 0
        shutil.rmtree(tmp_path / "pictures")
        assert {hit["picture"] for hit in httpx2.get(f"{address}/api/browse").json()["hits"]} == {None}
        assert error_of(httpx2.get(f"{address}/api/thumbnail/0"), 404)


def test_a_text_whose_picture_was_removed_shows_none(index: MemoryIndex, folder: Path) -> None:
    orphan = replace(index.hits[1], owner=1000)
    hits = [index.hits[0], orphan, *index.hits[2:]]
    with running(replace(index, hits=hits), HueModel(), FolderPictures(folder)) as address:
        shown = [hit["picture"] for hit in httpx2.get(f"{address}/api/browse").json()["hits"][:4]]
    assert shown == [0, None, 2, 2]


# ---------------------------------------------------------------------------------------------- requests

FORM = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=x; charset=undefined",
        "multipart/form-data; boundary=x; charset=idna",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 5000,
        "multipart/form-data; charset=undefined",
        "multipart/form-data",
    ],
)
def test_a_wrong_content_type_is_one_sentence(client: httpx2.Client, kind: str) -> None:
    for body in (
        FORM + b"\xff\r\n--x--\r\n",
        FORM,
        b"--x--",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff',
    ):
        sentence = error_of(client.post("/api/search", content=body, headers={"Content-Type": kind}), 400)
        assert "\n" not in sentence
        assert "charset" not in sentence or "leave it out" in sentence


def test_a_text_and_a_picture_are_too_much(client: httpx2.Client) -> None:
    asked = {"text": "a", "picture": "b"}
    assert "text and picture are both given" in error_of(client.get("/api/search", params=asked), 400)


def test_head_is_answered_as_get_without_a_body(client: httpx2.Client) -> None:
    for path in ("/", "/api/info", "/api/thumbnail/0", "/static/search.js"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/api/nothing", "/static/nothing", "/static/%00", "/static/" + "x" * 9999]
)
def test_an_address_without_anything_is_one_sentence(client: httpx2.Client, path: str) -> None:
    assert "there is nothing at this address" in error_of(client.get(path), 404)


def test_a_part_of_a_file_is_answered_by_the_whole(client: httpx2.Client) -> None:
    for wanted in ("bytes=0-3", "bytes=9-1", "bytes=99999999-", "junk"):
        answer = client.get("/static/search.js", headers={"Range": wanted})
        assert (answer.status_code, len(answer.content)) == (200, int(answer.headers["content-length"]))


def test_another_method_is_one_sentence(client: httpx2.Client) -> None:
    for method, path in (("PUT", "/api/search"), ("DELETE", "/"), ("POST", "/api/info"), ("POST", "/static/search.js")):
        assert f"{method} cannot be answered here" in error_of(client.request(method, path), 405)


@pytest.mark.parametrize("host", ["a\0b", "\udcff", "x" * 100, "a..b"])
def test_a_host_that_is_none_is_one_sentence(host: str) -> None:
    with pytest.raises(BadInput, match=r"--host .* cannot be listened on") as caught:
        listen(host, 0)
    str(caught.value).encode()


def test_a_name_that_others_made_lead_here_is_not_answered(index: MemoryIndex) -> None:
    """DNS rebinding: a page of evil.test has that name lead to this machine, and a browser says it as Host."""
    with (
        running(index, HueModel(), hosts=hosts_of("127.0.0.1", ["Photos.Example"])) as address,
        httpx2.Client() as client,
    ):
        for path in ("/", "/api/info", "/static/search.js"):
            for host in ("evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test:80"):
                said = error_of(client.get(address + path, headers={"Host": host}), 421)
                assert "--allowed-hosts" in said
            for host in ("localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:8000", "[::1]", "photos.example"):
                assert client.get(address + path, headers={"Host": host}).status_code == 200, host


@pytest.mark.parametrize(
    ("address", "any_name"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("0.0.0.0", True)],
)
def test_who_serves_other_machines_is_asked_under_any_name(address: str, any_name: bool) -> None:
    assert (not hosts_of(address, [])) == any_name


# ---------------------------------------------------------------------------------------------- connections


def connect(address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), 10)


def is_closed(connection: socket.socket, seconds: float = 20) -> bool:
    """Whether the server ends a connection, bytes that it sends before left out."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /api/info HTTP/1.1\r\nHost: x\r\n",
        b"GET /api/info HTTP/1.1\r\nHost: x\r\n\r\nGET /",
        b"POST /api/info HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n1",
        FORM.join(
            [
                b"POST /api/search HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n",
                b"",
            ]
        ),
    ],
    ids=["nothing", "half a header", "half a second header", "a body that nobody reads", "half a form"],
)
def test_who_goes_silent_is_left(index: MemoryIndex, said: bytes) -> None:
    limits = Limits(idle_seconds=0.3, upload_silence=0.3)
    with running(index, HueModel(), limits=limits) as address, connect(address) as connection:
        connection.sendall(said)
        assert is_closed(connection)


def test_who_does_not_read_is_left(index: MemoryIndex) -> None:
    asked, size = 2000, len(files("cmgan_dist.retrieval").joinpath("static/search.js").read_bytes())
    with running(index, HueModel(), limits=Limits(idle_seconds=0.3)) as address, connect(address) as connection:
        connection.settimeout(2)
        with contextlib.suppress(OSError):  # the server does not take all of it
            connection.sendall(b"GET /static/search.js HTTP/1.1\r\nHost: x\r\n\r\n" * asked)
        time.sleep(6)  # on a busy machine it takes seconds to send what the kernel holds
        came = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                came += len(part)
    assert came < asked * size


def test_silent_connections_do_not_keep_others_out(index: MemoryIndex) -> None:
    with running(index, HueModel(), limits=Limits(connections=8)) as address:
        silent = [connect(address) for _ in range(30)]
        assert httpx2.get(f"{address}/api/info", timeout=10).status_code == 200
        assert sum(not is_closed(each, 0.05) for each in silent) <= 8
        for each in silent:
            each.close()


def test_what_is_no_http_is_one_sentence(client: httpx2.Client) -> None:
    with connect(str(client.base_url).rstrip("/")) as connection:
        connection.sendall(b"junk\r\n\r\n")
        connection.settimeout(10)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert list(json.loads(body)) == ["error"]


def test_forms_that_do_not_come_keep_no_other_out(index: MemoryIndex) -> None:
    head = b"POST /api/search HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n"
    with running(index, HueModel()) as address, httpx2.Client(base_url=address, timeout=30) as client:
        stopped = [connect(address) for _ in range(20)]
        for each in stopped:
            each.sendall(head + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + FORM)
        time.sleep(0.3)
        assert upload(client, colour(0.1)).status_code == 200
        for each in stopped:
            each.close()


def test_the_bytes_of_all_uploads_are_bounded(index: MemoryIndex) -> None:
    limits = Limits(uploads_bytes=1 << 20)
    with running(index, HueModel(), limits=limits) as address, httpx2.Client(base_url=address, timeout=30) as client:
        assert "busy" in error_of(upload(client, bytes(2 << 20)), 503)
        assert "is no JPEG" in error_of(upload(client, bytes(1000)), 400)
        for _ in range(3):
            assert "is no JPEG" in error_of(upload(client, bytes(900_000)), 400)


# ---------------------------------------------------------------------------------------------- at once


def test_texts_are_answered_while_a_picture_is_decoded(index: MemoryIndex) -> None:
    with running(index, HueModel()) as address, httpx2.Client(base_url=address, timeout=60) as client:
        with ThreadPoolExecutor(1) as pool:
            slow, answered = pool.submit(upload, client, many_scans(7000, 20)), 0
            while not slow.done():
                assert httpx2.get(f"{address}/api/search", params={"text": f"red {answered}"}).status_code == 200
                answered += not slow.done()
        assert slow.result().status_code in (200, 400)
        assert answered > 0
