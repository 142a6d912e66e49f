"""Remote files from real servers on loopback: an HTTP server that fails on demand, and moto's S3."""

from __future__ import annotations

import base64
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import fsspec
import pytest

from cmgan_dist.data import source as source_module
from cmgan_dist.data.cache import CachedStore, open_store
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput, run_main
from tests.services.faulty_server import FaultyServer
from tests.services.object_store import running_s3
from tests.toy import body_of, content_of, run_together, shard_of

# ---------------------------------------------------------------------------------------------- tries


def test_an_unknown_protocol_and_a_missing_package_are_sentences(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with pytest.raises(BadInput, match="protocol 'ftp' is unknown"):
        open_store("ftp://host/data")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(BadInput, match=r"gs://bucket/data needs a package .*pip install gcsfs"):
        open_store("gs://bucket/data", cache=str(cache))


def test_a_signed_query_goes_to_the_server_and_into_no_message(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    store = make("/data?sig=secret")
    assert content_of(store, shard_of(1)) == body_of(1)
    assert store.read("manifest.json") == b'{"a": 1}'
    assert server.queries == {"sig=secret"}
    with pytest.raises(BadInput, match=r"/data/none\.json does not exist") as caught:
        store.read("none.json")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "reset", "truncated", "short", "long", "wrong", "stall"])
def test_a_fault_that_passes_is_retried(
    server: FaultyServer, make: Callable[..., CachedStore], fault: str, cache: Path
) -> None:
    server.faults["/data/s-1.tar"] = [fault, fault]
    assert content_of(make(timeout_s=0.5), shard_of(1)) == body_of(1)
    assert server.requests["/data/s-1.tar"] == 3
    assert (cache / f"{shard_of(1).sha256}.tar").read_bytes() == body_of(1)


def test_small_files_are_retried_too(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/manifest.json"] = ["500", "reset", "truncated"]
    assert make().read("manifest.json") == b'{"a": 1}'


def test_a_slow_body_that_moves_is_no_fault(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/s-1.tar"] = ["slow"]  # takes 0.4 s, more than the limit, which is for one without a byte
    assert content_of(make(timeout_s=0.3, retries=0), shard_of(1)) == body_of(1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("404", "does not exist"),
        ("410", "does not exist"),
        ("403", r"may not be read \(HTTP 403\)"),
        ("401", r"may not be read \(HTTP 401\)"),
        ("400", "HTTP 400"),
    ],
)
def test_a_refusal_is_told_at_once(
    server: FaultyServer, make: Callable[..., CachedStore], fault: str, said: str
) -> None:
    server.faults["/data/s-1.tar"] = [fault]
    with pytest.raises(BadInput, match=rf"{server.url}/data/s-1\.tar .*{said}|{said}"):
        make().open(shard_of(1))
    assert server.requests["/data/s-1.tar"] == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503", "HTTP 503"),
        ("reset", "Connection|payload"),
        ("short", "ended after 100000 of 200000 bytes"),
        ("wrong", "sha256"),
        ("stall", "nothing came in time"),
        ("silent", "nothing came in time"),
    ],
)
def test_a_dead_source_ends_in_one_sentence_within_its_time(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, fault: str, said: str
) -> None:
    server.faults["/data/s-1.tar"] = [fault, "always"]
    store = make(timeout_s=0.3, retries=2)
    began = time.monotonic()
    with pytest.raises(
        BadInput, match=rf"{server.url}/data/s-1\.tar could not be read in 3 tries .*({said})"
    ) as caught:
        store.open(shard_of(1))
    assert time.monotonic() - began < store.source.dead_after_s + 5  # of a busy machine
    assert "\n" not in str(caught.value)
    assert server.requests["/data/s-1.tar"] == 3
    assert [p.name for p in cache.iterdir()] == [".lock"]


def test_a_source_that_nobody_serves_ends_within_its_time(make: Callable[..., CachedStore], cache: Path) -> None:
    make()
    store = open_store("http://127.0.0.1:1/data", cache=str(cache), timeout_s=0.3, retries=2)
    assert isinstance(store, CachedStore)
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:1/data/manifest\.json could not be read in 3 tries"):
        store.read("manifest.json")
    assert time.monotonic() - began < store.source.dead_after_s + 5  # of a busy machine


def test_waits_grow_and_are_counted_in_the_stated_time(cache: Path) -> None:
    store = open_store("http://127.0.0.1:1/data", cache=str(cache), timeout_s=10.0, retries=3)
    assert isinstance(store, CachedStore)
    assert store.source.dead_after_s == 4 * 2 * 10.0 + 0.5 + 1.0 + 2.0


def test_the_waits_between_tries_are_kept(
    server: FaultyServer, make: Callable[..., CachedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    store = make(retries=4)
    monkeypatch.setattr(source_module, "BACKOFF_S", 10.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults["/data/manifest.json"] = ["503", "always"]
    with pytest.raises(BadInput, match="in 5 tries"):
        store.read("manifest.json")
    assert [longest / 2 <= wait <= longest for wait, longest in zip(waits, (10, 20, 30, 30), strict=True)] == [True] * 4
    assert len({wait / longest for wait, longest in zip(waits, (10, 20, 30, 30), strict=True)}) > 1  # spread


def test_garbage_of_the_parent_does_not_delay_a_child(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    # To collect a file system of fsspec closes its connections in its event loop, and waits 0.1 s for one that is gone.
    gc.disable()
    try:
        for _ in range(20):
            make().read("s-1.tar")
        store = make()

        def child(_: int) -> int:
            gc.collect()
            store.read("s-1.tar")
            return len(source_module.inherited)

        # Kept alive in the child, so that nothing waits for the parent's loop; without it the collection took 2 s.
        assert run_together(1, child)[0] >= 20  # and those of other tests
    finally:
        gc.enable()


@pytest.mark.parametrize("fault", ["drip", "drip header"])
def test_a_server_that_drips_is_not_waited_for(
    server: FaultyServer, make: Callable[..., CachedStore], fault: str
) -> None:
    server.faults = {path: [fault, "always"] for path in ("/data/s-1.tar", "/data/manifest.json")}
    server.files["/data/manifest.json"] = bytes(9000)
    store = make(timeout_s=0.4, retries=0)
    for read in (lambda: store.open(shard_of(1)), lambda: store.read("manifest.json")):
        with pytest.raises(BadInput, match=r"less than 16 KiB a second|nothing came in time"):
            read()


def test_a_small_file_without_bound_is_refused(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.files["/data/manifest.json"] = bytes(3 << 20)
    with pytest.raises(BadInput, match=r"/data/manifest\.json has more than 1 MiB"):
        make().source.read("manifest.json", 1 << 20)


def test_user_and_password_go_to_the_server_and_into_no_message(
    server: FaultyServer, make: Callable[..., CachedStore], capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    url = server.url.replace("://", "://anna:secret%40@") + "/data"
    store = open_store(url, cache=str(cache))
    assert store.read("manifest.json") == b'{"a": 1}'
    assert server.authorizations == {"Basic " + base64.b64encode(b"anna:secret@").decode()}
    assert store.location("x") == f"{server.url}/data/x"
    with pytest.raises(BadInput, match="does not exist") as caught:
        store.read("none.json")
    assert "secret" not in str(caught.value)
    with pytest.raises(SystemExit):
        run_main(lambda: open_store(url, cache=str(cache)).read("none.json") and 0)
    with pytest.raises(SystemExit):
        run_main(lambda: ShardReader(url.replace("http", "ftp"), "train") and 0)
    said = capsys.readouterr().err
    assert said.count("error: ") == 2
    assert "secret" not in said


def test_netrc_and_proxies_are_heeded(
    server: FaultyServer, make: Callable[..., CachedStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login anna password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    make().read("manifest.json")
    assert server.authorizations == {"Basic " + base64.b64encode(b"anna:secret").decode()}
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://elsewhere.invalid/data/manifest.json"] = b"by proxy"
    store = open_store("http://elsewhere.invalid/data", cache=str(tmp_path / "cache"), retries=0)
    assert store.read("manifest.json") == b"by proxy"


# ---------------------------------------------------------------------------------------------- S3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """s3(endpoint) sends all S3 requests to an endpoint."""

    def point(endpoint: str) -> None:
        monkeypatch.setattr(source_module, "BACKOFF_S", 0.02)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    return point


def test_s3_of_moto(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BACKOFF_S", 0.02)
    with running_s3("bucket"):
        monkeypatch.setattr(source_module, "BLOCK", 64_000)  # several ranges a shard
        client = boto3.client("s3")
        for i in range(3):
            client.put_object(Bucket="bucket", Key=f"data/s-{i}.tar", Body=body_of(i))
        client.put_object(Bucket="bucket", Key="data/manifest.json", Body=b"{}")
        store = open_store("s3://bucket/data/", cache=str(cache), retries=1, timeout_s=10)
        assert store.read("manifest.json") == b"{}"
        shards = [shard_of(i) for i in range(3)]
        assert content_of(store, shards[0]) == body_of(0)
        assert run_together(2, lambda i: content_of(store, shards[1 + i]) == body_of(1 + i)) == [True] * 2
        for name in ("none.json", "s-9.tar"):
            with pytest.raises(BadInput, match=rf"s3://bucket/data/{name} does not exist"):
                store.open(shard_of(9)) if name.endswith("tar") else store.read(name)
        client.put_object(Bucket="bucket", Key="data/s-2.tar", Body=body_of(2)[:-1000])
        (cache / f"{shards[2].sha256}.tar").unlink()
        with pytest.raises(
            BadInput, match=r"s3://bucket/data/s-2\.tar could not be read in 2 tries.*ended after 199000"
        ):
            store.open(shards[2])


def test_s3_faults_are_retried_once_a_try(s3: Callable[[str], None], server: FaultyServer, cache: Path) -> None:
    pytest.importorskip("s3fs")
    s3(server.url)
    path = "/data/s-1.tar"  # bucket "data"
    store = open_store("s3://data", cache=str(cache), retries=5, timeout_s=0.5)
    server.faults[path] = ["500", "503", "truncated", "reset", "stall"]
    began = time.monotonic()
    assert content_of(store, shard_of(1)) == body_of(1)
    assert server.requests[path] == 6
    assert time.monotonic() - began < 8  # the server ends a stall after 20 s, botocore after 60 s
    path = "/data/s-3.tar"
    server.faults[path] = ["truncated", "always"]
    with pytest.raises(BadInput, match=r"s3://data/s-3\.tar could not be read in 6 tries .*payload"):
        store.open(shard_of(3))
    assert server.requests[path] == 6  # s3fs has not tried again on its own
    path = "/data/s-2.tar"
    server.faults[path] = ["503", "always"]
    with pytest.raises(BadInput, match=r"s3://data/s-2\.tar could not be read in 6 tries .*HTTP 503"):
        store.open(shard_of(2))
    assert server.requests[path] == 6
    server.faults[path] = ["403"]
    with pytest.raises(BadInput, match=r"s3://data/s-2\.tar may not be read \(HTTP 403\)"):
        store.open(shard_of(2))
    assert server.requests[path] == 7


def test_s3_without_credentials_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, server: FaultyServer, cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("s3fs")
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"s3://data/s-1\.tar needs credentials"):
        open_store("s3://data", cache=str(cache)).open(shard_of(1))
    assert time.monotonic() - began < 30
    assert not server.requests


# ---------------------------------------------------------------------------------------------- Google


def test_gs_faults_are_retried_once_a_try(monkeypatch: pytest.MonkeyPatch, server: FaultyServer, cache: Path) -> None:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    monkeypatch.setattr(source_module, "BACKOFF_S", 0.02)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    one, two = (f"/download/storage/v1/b/bucket/o/data%2Fs-{i}.tar" for i in (1, 2))
    server.files = {one: body_of(1), two: body_of(2)}
    server.faults = {one: ["503", "truncated", "reset", "stall"], two: ["silent", "always"]}
    store = open_store("gs://bucket/data", cache=str(cache), retries=4, timeout_s=0.4)
    assert content_of(store, shard_of(1)) == body_of(1)
    assert server.requests[one] == 5
    with pytest.raises(
        BadInput, match=r"gs://bucket/data/s-2\.tar could not be read in 5 tries .*nothing came in time"
    ):
        store.open(shard_of(2))
    assert server.requests[two] == 5
    server.faults = {two: ["403"]}
    with pytest.raises(BadInput, match=r"gs://bucket/data/s-2\.tar may not be read"):
        store.open(shard_of(2))
    with pytest.raises(BadInput, match=r"gs://bucket/data/s-3\.tar does not exist"):
        store.open(shard_of(3))
    assert run_together(2, lambda i: content_of(store, shard_of(2)) == body_of(2)) == [True] * 2
