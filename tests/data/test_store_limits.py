"""Object stores that answer a byte now and then: every way in which a store is used ends, in one sentence."""

from __future__ import annotations

import hashlib
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import s3fs

from cmgan_dist.data import source, store
from cmgan_dist.data.source import RemoteSource
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from shards.urls import fetch
from tests.services.faulty_server import FaultyServer
from tests.services.object_store import running_s3

HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"


def drip(connection: socket.socket, ended: threading.Event) -> None:
    """Answer one request: at once where only a header is asked for, else a byte every 0.1 s."""
    with connection, suppress(OSError):
        request = connection.recv(1 << 16)
        connection.sendall(HEADER % 20_000)
        while not request.startswith(b"HEAD") and not ended.wait(0.1):
            connection.sendall(b" ")


@pytest.fixture
def dripping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send all S3 requests to an endpoint that drips."""
    ended, listening = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=[listening.accept()[0], ended], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    given = {"ENDPOINT_URL": f"http://127.0.0.1:{listening.getsockname()[1]}", "DEFAULT_REGION": "us-east-1"}
    for name, value in (given | {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    ended.set()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda files, path: files.names(), r"read \(no whole answer in time\)"),
        (lambda files, path: files.own_names(), r"read \(no whole answer in time\)"),
        (lambda files, path: files.read("a"), r"read \(a: no whole answer in time\)"),
        (lambda files, path: files.sha256("a"), r"read \(a: no whole answer in time\)"),
        (lambda files, path: files.fetch("a", path), r"read \(a: no whole answer in time\)"),
        (lambda files, path: files.write("a", "x"), r"written \(a: no whole answer in time\)"),
        (lambda files, path: files.put_file(Path(__file__), "a"), r"written \(a: no whole answer in time\)"),
        (lambda files, path: files.remove("a"), r"written \(a: no whole answer in time\)"),
    ],
    ids=["names", "own_names", "read", "sha256", "fetch", "write", "put_file", "remove"],
)
def test_a_store_that_drips_is_given_up(
    dripping: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use: Callable[..., object], what: str
) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 1.0)
    monkeypatch.setattr(store, "LIST_S", 1.0)
    monkeypatch.setattr(store, "LEAST_BYTES_S", 1 << 20)
    monkeypatch.setattr(store, "BLOCK", 1 << 20)
    with pytest.raises(BadInput, match=rf"^--output s3://bucket/x cannot be {what}: use another place$"):
        use(FileStore("s3://bucket/x", "--output"), tmp_path / "copy")


def test_whole_files_come_in_blocks_whatever_their_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "BLOCK", 10)
    monkeypatch.setattr(store, "BLOCK", 10)
    with running_s3("bucket"):
        files, remote = FileStore("s3://bucket/x", "--output"), RemoteSource("s3://bucket/x", retries=0, timeout_s=5)
        for size in (0, 5, 10, 25, 30):
            content = bytes(range(size))
            files.write("a", content)
            assert (files.read("a"), files.size("a")) == (content, size)
            assert files.sha256("a") == hashlib.sha256(content).hexdigest()
            files.fetch("a", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == content
            assert remote.read("a", 1 << 20) == content
        files.put_file(tmp_path / "copy", "b/c")
        assert files.names() == ["a", "b/c"]
        files.remove("a")
        assert (files.names(), files.sha256("a"), files.size("a")) == (["b/c"], None, None)
        with pytest.raises(FileNotFoundError):
            files.read("a")


def test_a_small_file_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    ask = FileStore._ask

    def counted(files: FileStore, method: str, *arguments: object, **options: object) -> object:
        asked.append(method)
        return ask(files, method, *arguments, **options)  # type: ignore[arg-type]

    with running_s3("bucket"):
        files = FileStore("s3://bucket/x", "--output")
        for content in (b"", b"x", bytes(1000)):
            files.write("a", content)
            monkeypatch.setattr(FileStore, "_ask", counted)
            asked.clear()
            assert (files.read("a"), asked) == (content, ["cat_file"])
            monkeypatch.setattr(FileStore, "_ask", ask)


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """Let no file be written beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_is_not_the_servers_fault(tmp_path: Path) -> None:
    content = bytes(1 << 18)
    server = FaultyServer()
    server.files = {"/t.csv": content}
    try:
        sentence = r"^\S+/t\.csv cannot be written \(File too large\): free space there, and start again$"
        with full_at(1 << 16), pytest.raises(BadInput, match=sentence):
            fetch(f"{server.url}/t.csv", tmp_path, retries=0, timeout_s=5)
        assert fetch(f"{server.url}/t.csv", tmp_path, retries=0, timeout_s=5).read_bytes() == content
    finally:
        server.close()
    with running_s3("bucket"):
        files = FileStore("s3://bucket/x", "--output")
        files.write("t.csv", content)
        with full_at(1 << 16), pytest.raises(BadInput, match=sentence):
            files.fetch("t.csv", tmp_path / "t.csv")
        files.fetch("t.csv", tmp_path / "t.csv")
        assert (tmp_path / "t.csv").read_bytes() == content
