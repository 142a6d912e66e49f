"""Folders, local and remote: shards are read where they lie, results are written whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cmgan_dist.data.cache import open_store
from cmgan_dist.data.source import RemoteSource, lower_protocol
from cmgan_dist.data.store import FileStore, LocalStore
from cmgan_dist.errors import BadInput
from tests.toy import content_of, shard_of


def test_a_folder_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "s-1.tar").write_bytes(b"not what the manifest says")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    for data in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"File://{tmp_path}"):
        store = open_store(data)
        assert isinstance(store, LocalStore)
        assert store.read("manifest.json") == b"{}"
        assert content_of(store, shard_of(1)) == b"not what the manifest says"
        assert store.location("a") == str(tmp_path / "a")
        store.check([shard_of(1)])
        with pytest.raises(BadInput, match=r"s-2\.tar is in the manifest but not in the folder"):
            store.check([shard_of(2)])
        with pytest.raises(BadInput, match=r"s-2\.tar is in the manifest but not in the folder"):
            store.open(shard_of(2))
        with pytest.raises(BadInput, match=r"shard index .* does not exist"):
            store.read("s-1.index.npz")
    with pytest.raises(BadInput, match=r"data folder .* does not exist"):
        open_store(tmp_path / "none").read("manifest.json")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BadInput, match="has no manifest"):
        open_store(tmp_path).read("manifest.json")


def test_the_protocol_of_a_url_is_the_same_in_any_case(tmp_path: Path) -> None:
    store = FileStore(f"FILE://{tmp_path}", "--output")
    assert store.local
    assert store.is_at(f"File://{tmp_path}")
    store.write("a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert FileStore("S3://Bucket/x", "--output").objects
    with pytest.raises(BadInput, match="names no bucket"):
        FileStore("S3://", "--output")
    with pytest.raises(BadInput, match="cannot be written by https: name a folder, or a URL of s3 or gs"):
        FileStore("HTTPS://host/x", "--output").check_writable()
    source = RemoteSource("HTTPS://Host/A?Sig=B", retries=0, timeout_s=1)
    assert (source.protocol, source.base, source.query) == ("https", "https://Host/A", "?Sig=B")
    assert lower_protocol("/data/A://B") == "/data/A://B"


@pytest.fixture(params=["local", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder that does not exist yet: by path, by URL, and in a file system that is no disk."""
    if request.param != "memory":
        yield f"file://{tmp_path}/out" if request.param == "file" else f"{tmp_path}/out/"
        return
    yield "memory://bucket/out"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_what_is_written_is_read_again(url: str, tmp_path: Path) -> None:
    store = FileStore(url, "--output")
    with pytest.raises(FileNotFoundError):
        store.read("a.json")
    store.write("a.json", "first")
    store.write("a.json", "zweite: ü")
    store.write("b", b"\xff")
    assert FileStore(url, "--output").read("a.json").decode() == "zweite: ü"
    assert store.read("b") == b"\xff"
    assert store.location("a.json") == url.rstrip("/") + "/a.json"
    if store.local:
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.json", "b"}


def test_files_are_listed_measured_copied_and_removed(url: str, tmp_path: Path) -> None:
    store = FileStore(url, "--output")
    assert (store.names(), store.size("a")) == ([], None)
    for name in ("b", "part/0.npy", "a"):
        store.write(name, name)
    assert store.names() == ["a", "b", "part/0.npy"]
    assert store.size("part/0.npy") == 10
    assert store.sha256("part/0.npy") == hashlib.sha256(b"part/0.npy").hexdigest()
    assert store.sha256("none") is None
    store.fetch("part/0.npy", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"part/0.npy"
    store.remove("part/0.npy")
    store.remove("part/0.npy")
    assert store.names() == ["a", "b"]


def test_a_folder_is_put_with_all_its_files(url: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "log").write_text("x")
    (tmp_path / "run" / "best" / "model").write_bytes(b"weights")
    store = FileStore(url, "--output")
    store.put(tmp_path / "run", "copy")
    assert store.read("copy/log") == b"x"
    assert store.read("copy/best/model") == b"weights"


def test_a_folder_that_cannot_be_used_is_a_sentence_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--output nosuch://x cannot be opened"):
        FileStore("nosuch://x", "--output")
    (tmp_path / "file").write_text("")
    store = FileStore(str(tmp_path / "file"), "--output")
    for write in (lambda: store.write("a", "x"), lambda: store.put(tmp_path, "a")):
        with pytest.raises(BadInput, match=r"--output .*file cannot be written .*: use another place"):
            write()
    with pytest.raises(BadInput, match=r"--output .*file cannot be read .*: use another place"):
        store.read("a")


def test_urls_that_no_store_can_be_asked_by_are_sentences(tmp_path: Path) -> None:
    for url in ("s3://", "s3:///"):
        with pytest.raises(BadInput, match=rf"--output {url} names no bucket: name one"):
            FileStore(url, "--output")
    with pytest.raises(BadInput, match=r"--output http\S+ cannot be read .*no URL that can be asked for"):
        FileStore("http://127.0.0.1:99999/a", "--output").read("b")
    with pytest.raises(
        BadInput, match=r"99999/a/manifest\.json is no URL that can be asked for: check its host and port"
    ):
        open_store("http://127.0.0.1:99999/a", cache=str(tmp_path)).read("manifest.json")
