"""Tables whose pictures are URLs, and tables at a URL: tries, time limits, dead links, and no secrets in words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import boto3
import psutil
import pytest

from cmgan_dist.data import source
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from shards.urls import MOST_HOSTS, UrlBytes, joined, key_of
from tests.services.faulty_server import FaultyServer
from tests.services.object_store import running_s3
from tests.toy import files_of, picture, run_shards, samples_of, wait_for, write_table


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(source, "BACKOFF_S", 0.01)
    server = FaultyServer()
    server.files = {f"/p/{i}.png": picture(i) for i in range(40)}
    yield server
    server.close()


def rows_of(server: FaultyServer, query: str = "") -> list[dict[str, str]]:
    return [{"url": f"{server.url}/p/{i}.png{query}", "caption": f"text {i}"} for i in range(40)]


LONG = ("--timeout-s", 60)
"""Where nothing is waited for but a busy machine."""


def build(table: Path | str, output: Path, *more: object) -> None:
    options = ("--val", 0, "--test", 0, "--processes", 1, "--timeout-s", 3)
    run_shards("build", "table", table, "--output", output, *options, *more)


def test_pictures_by_url_are_tried_again_and_fetched_once(server: FaultyServer, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", rows_of(server))
    server.faults = {"/p/3.png": ["500", "reset"], "/p/7.png": ["truncated"], "/p/9.png": ["stall"]}
    build(table, tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 40
    assert samples_of(tmp_path / "out")[key_of(f"{server.url}/p/3.png")] == (["text 3"], ())
    fetched = server.requests.total()
    assert [server.requests[f"/p/{i}.png"] for i in (3, 7, 9)] == [3, 2, 2]
    build(table, tmp_path / "out")
    assert server.requests.total() == fetched  # what is behind a URL does not change
    build(table, tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_a_protocol_in_capitals_is_one(server: FaultyServer, tmp_path: Path) -> None:
    rows = [{"url": row["url"].replace("http", "HTTP", 1), "caption": row["caption"]} for row in rows_of(server)]
    build(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 40


def test_a_dead_link_is_named_without_secrets_and_left_out_when_asked(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "t.csv", rows_of(server, "?sig=secret"))
    server.faults = {"/p/5.png": ["404", "always"], "/p/6.png": ["503", "always"]}
    with pytest.raises(BadInput, match=r"row \d+ of t\.csv: http\S+/p/\d\.png (does not exist|was not read)") as caught:
        build(table, tmp_path / "out", "--retries", 1)
    assert "secret" not in str(caught.value)
    assert "stream." not in str(caught.value)
    build(table, tmp_path / "out", "--retries", 1, "--skip-bad")
    said = capsys.readouterr()
    assert len(samples_of(tmp_path / "out")) == 38
    assert "left out 2 bad pairs" in said.err
    assert "secret" not in said.err + said.out
    assert server.queries == {"sig=secret"}


def test_what_was_left_out_is_listed_again_and_tried_again_when_asked(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = write_table(tmp_path / "t.csv", rows_of(server)), tmp_path / "out"
    options = ("--retries", 0, "--skip-bad", "--shard-samples", 10)
    server.faults = {"/p/5.png": ["404", "always"], "/p/6.png": ["404", "always"]}
    build(table, out, *options)
    first = capsys.readouterr().err
    server.faults = {}
    fetched = server.requests.total()
    build(table, out, *options)
    said = capsys.readouterr()
    assert "already packed" in said.out
    assert "--overwrite tries them again" in said.out
    assert said.err == first
    assert "left out 2 bad pairs" in first
    assert server.requests.total() == fetched
    build(table, out, *options, "--overwrite")
    assert "left out" not in capsys.readouterr().err
    assert server.requests.total() < fetched + 40  # shards without dead links stay
    build(table, tmp_path / "fresh", *options)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_table_at_a_url_with_pictures_beside_it(server: FaultyServer, tmp_path: Path) -> None:
    rows = [{"image": f"p/{i}.png", "text": f"text {i}"} for i in range(40)]
    server.files["/t.csv"] = write_table(tmp_path / "t.csv", rows).read_bytes()
    server.faults["/t.csv"] = ["500", "truncated"]
    build(f"{server.url}/t.csv?sig=secret", tmp_path / "out")
    assert samples_of(tmp_path / "out")["p/3"] == (["text 3"], ())
    with pytest.raises(BadInput, match=r"none\.csv does not exist: check the URL") as caught:
        build(f"{server.url}/none.csv?sig=secret", tmp_path / "none")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "none").exists()


MALFORMED = ["127.0.0.1:99999", "[::1", "127.0.0.1:abc", "user:word@", f"{'a' * 70}.com", "..a..", ""]
"""Hosts that no server can be asked by."""


class Unquoted(dict[str, bytes]):
    """Files by their names, for a server that is asked by paths of URLs."""

    def get(self, path: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        return super().get(unquote(path), default)


def test_names_beside_a_table_at_a_url_are_those_of_files(server: FaultyServer, tmp_path: Path) -> None:
    names = ["a b.png", "a%20b.png", "a#1.png", "q?x.png", "é+&;=.png", "x/%2e/c:d.png", "%zz.png"]
    rows = [{"image": name, "caption": f"text {i}"} for i, name in enumerate(names)]
    table = write_table(tmp_path / "t.csv", rows).read_bytes()
    server.files = Unquoted({f"/p/{name}": picture(i) for i, name in enumerate(names)} | {"/p/t.csv": table})
    build(f"{server.url}/p/t.csv", tmp_path / "out")
    found = {sample.texts[0]: sample.image for sample in ShardReader(str(tmp_path / "out"), "train")}
    assert found == {f"text {i}": picture(i) for i in range(len(names))}


def test_malformed_urls_are_left_out_and_named_when_asked(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"url": f"http://{host}/a{i}.png", "caption": f"text {i}"} for i, host in enumerate(MALFORMED)]
    for row in rows:
        table = write_table(tmp_path / "one.csv", [row])
        with pytest.raises(
            BadInput, match=r"row 2 of one\.csv: http\S+ .*(is no URL that can be asked for|InvalidUrl)"
        ):
            build(table, tmp_path / "one", "--retries", 0)
    build(
        write_table(tmp_path / "t.csv", rows_of(server) + rows), tmp_path / "out", "--skip-bad", "--retries", 0, *LONG
    )
    assert len(samples_of(tmp_path / "out")) == 40
    said = capsys.readouterr().err
    assert f"left out {len(MALFORMED)} bad pairs" in said
    assert "word@" not in said
    with pytest.raises(BadInput, match="is no URL that can be asked for"):
        build("http://127.0.0.1:99999/t.csv", tmp_path / "none")


def test_places_of_pictures_beside_a_table() -> None:
    assert joined("https://h/a/t.csv?x=1", "p/1.jpg") == "https://h/a/p/1.jpg"
    assert joined("s3://bucket/t.csv", "1.jpg") == "s3://bucket/1.jpg"
    assert joined("s3://bucket/t.csv", "a%20b#1?.jpg") == "s3://bucket/a%20b#1?.jpg"
    assert joined("HTTP://h/a%20b/t.csv", "p/c%20d#1?.jpg") == "http://h/a%20b/p/c%2520d%231%3F.jpg"
    assert joined("https://h/a/t.csv", "http://other/1.jpg") == "http://other/1.jpg"
    assert key_of("https://u:p@h/a/b.jpg?sig=1") != key_of("https://u:p@h/a/b.jpg?sig=2")
    assert key_of("https://u:p@h/a/b.jpg?sig=1").startswith("b-")


@pytest.mark.parametrize(
    "words", [("--retries", -1), ("--retries", 101), *(("--timeout-s", x) for x in (0, "inf", "nan"))]
)
def test_limits_that_make_no_sense_are_named(server: FaultyServer, tmp_path: Path, words: tuple[object, ...]) -> None:
    table = write_table(tmp_path / "t.csv", rows_of(server))
    with pytest.raises(BadInput, match=r"--retries must be from 0 to 100, and --timeout-s from 0\.01"):
        run_shards("build", "table", table, "--output", tmp_path / "out", *words)


def test_a_folder_by_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="INPUT is a URL where only a path on this machine is read"):
        run_shards("build", "folder", "s3://bucket/pictures", "--output", tmp_path / "out")


def test_pictures_on_s3(tmp_path: Path) -> None:
    with running_s3("bucket"):
        client = boto3.client("s3")
        for i in range(3):
            client.put_object(Bucket="bucket", Key=f"p/{i}.png", Body=picture(i))
        rows = [{"url": f"s3://bucket/p/{i}.png", "caption": f"text {i}"} for i in range(3)]
        client.put_object(Bucket="bucket", Key="t.csv", Body=write_table(tmp_path / "t.csv", rows).read_bytes())
        build("s3://bucket/t.csv", tmp_path / "out", "--timeout-s", 10)
        assert samples_of(tmp_path / "out")[key_of("s3://bucket/p/1.png")] == (["text 1"], ())


def test_a_url_without_a_files_name_is_said_at_once(server: FaultyServer, tmp_path: Path) -> None:
    for url in (f"{server.url}/dir/", f"{server.url}/", f"{server.url}/?table=1.csv"):
        with pytest.raises(BadInput, match=r"^http://\S+ names no file: give that of a table, such as"):
            build(url, tmp_path / "out")
    for url in (server.url, f"{server.url}/table?name=table.csv"):
        with pytest.raises(BadInput, match=r"^http://\S+ is not a table that can be read: expected .csv"):
            build(url, tmp_path / "out")
    assert not server.requests


class KeepingAlive(BaseHTTPRequestHandler):
    """Answers every request and ends no connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"bytes")

    def log_message(self, *_: object) -> None:
        pass


def test_connections_to_servers_are_few_whatever_their_number() -> None:
    server = ThreadingHTTPServer(("0.0.0.0", 0), KeepingAlive)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def connected() -> int:
        ends = (connection.raddr for connection in psutil.Process().net_connections("tcp") if connection.raddr)
        return sum(end.port == server.server_port for end in ends)

    try:
        for host in [*range(1, MOST_HOSTS + 20), 1]:  # the last is one that was forgotten
            assert UrlBytes(f"http://127.0.0.{host}:{server.server_port}/1.png", 0, 3.0).read() == b"bytes"
        assert connected() > 0
        wait_for(lambda: connected() <= MOST_HOSTS)
    finally:
        server.shutdown()
        server.server_close()
