"""Stores against real servers on loopback: an HTTP server that fails on demand, and moto's S3."""

from __future__ import annotations

import errno
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cmgan_dist.data import cache as cache_module
from cmgan_dist.data.cache import CachedStore, open_store
from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.store import LocalStore, ShardStore
from cmgan_dist.errors import BadInput
from tests.services.faulty_server import FaultyServer

SIZE = 200_000
fork = multiprocessing.get_context("fork")  # as DataLoader workers are


def body_of(i: int, size: int = SIZE) -> bytes:
    return hashlib.shake_128(str(i).encode()).digest(size)


def shard_of(i: int, size: int = SIZE) -> ShardInfo:
    return ShardInfo(f"s-{i}.tar", 1, size, hashlib.sha256(body_of(i, size)).hexdigest())


def content(store: ShardStore, shard: ShardInfo) -> bytes:
    file = store.open(shard)
    try:
        return os.pread(file, shard.bytes + 1, 0)
    finally:
        os.close(file)


def run_together(count: int, work: Callable[[int], Any], within_s: float = 20.0) -> list[Any]:
    """What `work(i)` returns in `count` forked processes, or the text of its BadInput."""
    results = fork.SimpleQueue()

    def child(i: int) -> None:
        try:
            results.put((i, work(i)))
        except BadInput as error:
            results.put((i, str(error)))

    processes = [fork.Process(target=child, args=[i]) for i in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [p for p in processes if p.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} of {count} processes still run after {within_s} s"
    return [value for _, value in sorted(results.get() for _ in processes)]


def wait_for(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    server.files = {f"/data/s-{i}.tar": body_of(i) for i in range(10)}
    server.files["/data/manifest.json"] = b'{"a": 1}'
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make(server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CachedStore]:
    """make(**options of open_store): a store of the server with short waits."""
    monkeypatch.setattr(cache_module, "BACKOFF_S", 0.02)

    def make(path: str = "/data", **options: Any) -> CachedStore:
        defaults: dict[str, Any] = {"cache": str(cache), "timeout_s": 5.0, "retries": 3}
        store = open_store(server.url + path, **(defaults | options))
        assert isinstance(store, CachedStore)
        return store

    return make


# ---------------------------------------------------------------------------------------------- which store


def test_a_folder_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "s-1.tar").write_bytes(b"not what the manifest says")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    for data in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = open_store(data)
        assert isinstance(store, LocalStore)
        assert store.read("manifest.json") == b"{}"
        assert content(store, shard_of(1)) == b"not what the manifest says"
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


def test_an_unknown_protocol_and_a_missing_package_are_sentences(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with pytest.raises(BadInput, match="protocol 'ftp' is unknown"):
        open_store("ftp://host/data")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(BadInput, match=r"gs://bucket/data needs a package .*pip install gcsfs"):
        open_store("gs://bucket/data", cache=str(cache))


def test_the_default_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_store("http://127.0.0.1:1/data")
    assert isinstance(store, CachedStore)
    assert store.folder == tmp_path / "cmgan_dist" / "shards"


def test_a_cache_folder_that_cannot_be_used_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cache folder .* cannot be used .*stream\.cache"):
        open_store("http://127.0.0.1:1/data", cache=str(tmp_path / "file"))
    monkeypatch.setattr("fcntl.flock", lambda *_: None)  # as on some network file systems
    with pytest.raises(BadInput, match="without working locks"):
        open_store("http://127.0.0.1:1/data", cache=str(tmp_path / "nfs"))


# ---------------------------------------------------------------------------------------------- reading


def test_a_shard_is_fetched_once_and_named_by_content(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    server.files["/other/s-1.tar"] = body_of(1)
    assert make().read("manifest.json") == b'{"a": 1}'
    assert content(make(), shard_of(1)) == body_of(1)
    assert content(make(), shard_of(1)) == body_of(1)
    assert content(make("/other"), shard_of(1)) == body_of(1)
    assert server.requests == {"/data/manifest.json": 1, "/data/s-1.tar": 1}
    assert sorted(p.name for p in cache.iterdir()) == [".lock", f"{shard_of(1).sha256}.tar"]


def test_a_shard_is_on_disk_before_it_has_its_name(
    make: Callable[..., CachedStore], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: names.append(sorted(p.name[:6] for p in cache.iterdir())))
    os.close(make().open(shard_of(1)))
    assert names == [[".lock", ".part-"]]


def test_a_signed_query_goes_to_the_server_and_into_no_message(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    store = make("/data?sig=secret")
    assert content(store, shard_of(1)) == body_of(1)
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
    assert content(make(timeout_s=0.5), shard_of(1)) == body_of(1)
    assert server.requests["/data/s-1.tar"] == 3
    assert (cache / f"{shard_of(1).sha256}.tar").read_bytes() == body_of(1)


def test_small_files_are_retried_too(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/manifest.json"] = ["500", "reset", "truncated"]
    assert make().read("manifest.json") == b'{"a": 1}'


def test_a_slow_body_that_moves_is_no_fault(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/s-1.tar"] = ["slow"]  # takes 0.4 s, more than the limit, which is for one without a byte
    assert content(make(timeout_s=0.3, retries=0), shard_of(1)) == body_of(1)


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
        ("stall", "nothing came within"),
        ("silent", "nothing came within"),
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
    assert time.monotonic() - began < store.dead_after_s + 5  # of a busy machine
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
    assert time.monotonic() - began < store.dead_after_s + 5  # of a busy machine


def test_waits_grow_and_are_counted_in_the_stated_time(cache: Path) -> None:
    store = open_store("http://127.0.0.1:1/data", cache=str(cache), timeout_s=10.0, retries=3)
    assert isinstance(store, CachedStore)
    assert store.dead_after_s == 4 * 2 * 10.0 + 0.5 + 1.0 + 2.0


def test_the_waits_between_tries_are_kept(
    server: FaultyServer, make: Callable[..., CachedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    store = make(retries=4)
    monkeypatch.setattr(cache_module, "BACKOFF_S", 10.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults["/data/manifest.json"] = ["503", "always"]
    with pytest.raises(BadInput, match="in 5 tries"):
        store.read("manifest.json")
    assert [longest / 2 <= wait <= longest for wait, longest in zip(waits, (10, 20, 30, 30), strict=True)] == [True] * 4
    assert len({wait / longest for wait, longest in zip(waits, (10, 20, 30, 30), strict=True)}) > 1  # spread


def test_a_manifest_without_checksum_is_refused(make: Callable[..., CachedStore]) -> None:
    for sha256 in ("", "../../" + "a" * 58):
        with pytest.raises(BadInput, match="no bytes or sha256"):
            make().open(ShardInfo("s-1.tar", 1, SIZE, sha256))


# ---------------------------------------------------------------------------------------------- processes


def test_processes_that_want_one_shard_fetch_it_once(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/s-1.tar"] = ["slow"]
    store = make()
    store.read("manifest.json")  # the parent's connections and threads must not disturb the children
    shard = shard_of(1)
    assert run_together(5, lambda i: content(store, shard) == body_of(1)) == [True] * 5
    assert server.requests["/data/s-1.tar"] == 1


def test_a_shard_that_came_between_the_look_and_the_lock_is_not_fetched_again(
    server: FaultyServer, make: Callable[..., CachedStore], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    os.close(make().open(shard_of(1)))
    store, looks = make(), [None]
    look = store._cached
    monkeypatch.setattr(store, "_cached", lambda shard: looks.pop() if looks else look(shard))
    assert content(store, shard_of(1)) == body_of(1)
    assert server.requests["/data/s-1.tar"] == 1
    assert not list(cache.glob(".part-*"))


def test_those_who_wait_for_a_dead_source_fail_with_the_first(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    server.faults["/data/s-1.tar"] = ["stall", "always"]
    store, shard = make(timeout_s=0.7, retries=1), shard_of(1)
    began = time.monotonic()
    said = run_together(5, lambda i: store.open(shard))
    assert len(set(said)) == 1
    assert "could not be read in 2 tries" in said[0]
    assert server.requests["/data/s-1.tar"] == 2
    assert time.monotonic() - began < store.dead_after_s + 5  # of a busy machine


@pytest.mark.parametrize("waiting", [False, True])
def test_kill_9_leaves_nothing_half_and_the_next_succeeds(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, waiting: bool
) -> None:
    server.faults["/data/s-1.tar"] = ["stall"]
    store, shard = make(timeout_s=15.0), shard_of(1)
    victim = fork.Process(target=store.open, args=[shard])
    victim.start()
    assert server.half_sent.wait(10)
    wait_for(lambda: bool(list(cache.glob(".part-*"))))
    results: list[bytes] = []
    waiter = threading.Thread(target=lambda: results.append(content(store, shard)))
    if waiting:  # for the lock of the victim
        waiter.start()
        time.sleep(0.3)
        assert not results
        assert server.requests["/data/s-1.tar"] == 1
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    if not waiting:
        assert [p.name for p in cache.glob(".part-*")] == [f".part-{shard.sha256}"]
        assert not list(cache.glob("*.tar"))
        waiter.start()
    waiter.join(5)
    assert results == [body_of(1)]
    assert [p.name for p in cache.iterdir() if p.name != ".lock"] == [f"{shard.sha256}.tar"]


def test_what_a_killed_process_left_is_removed_when_room_is_made(
    make: Callable[..., CachedStore], cache: Path, server: FaultyServer
) -> None:
    store = make(cache_bytes=SIZE)
    leftover = cache / f".part-{shard_of(2).sha256}"
    leftover.write_bytes(b"x" * SIZE)
    assert content(store, shard_of(1)) == body_of(1)
    assert not leftover.exists()


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    server.faults["/data/s-1.tar"] = ["stall"]
    store, shard = make(timeout_s=15.0), shard_of(1)
    child_pid = fork.SimpleQueue()

    def parent() -> None:
        threading.Thread(target=store.open, args=[shard], daemon=True).start()
        wait_for(lambda: bool(cache_module._held))
        time.sleep(0.1)
        pid = os.fork()
        if not pid:
            time.sleep(15)
            os._exit(0)
        child_pid.put(pid)
        time.sleep(15)

    process = fork.Process(target=parent)
    process.start()
    orphan = child_pid.get()
    try:
        assert server.half_sent.wait(10)
        process.kill()
        process.join()
        began = time.monotonic()
        assert content(store, shard) == body_of(1)
        assert time.monotonic() - began < 5
    finally:
        os.kill(orphan, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------- bound


def largest_seen(cache: Path, stop: threading.Event, seen: list[int]) -> None:
    """Notes the sum of the cache's files, each counted once though it be renamed meanwhile."""
    while not stop.is_set():
        sizes = {}
        for entry in os.scandir(cache):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            sizes[stat.st_ino] = stat.st_size
        seen.append(sum(sizes.values()))
        time.sleep(0.0005)


def test_the_bound_holds_while_processes_read_more_than_fits(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    bound = 3 * SIZE + 1000
    store = make(cache_bytes=bound)
    shards = [shard_of(i) for i in range(10)]

    def read_all(start: int) -> int:
        order = [(start * 3 + k * 7) % 10 for k in range(10)]
        return sum(content(store, shards[i]) == body_of(i) for i in order)

    stop, seen = threading.Event(), list[int]()
    monitor = threading.Thread(target=largest_seen, args=[cache, stop, seen])
    monitor.start()
    try:
        assert run_together(3, read_all) == [10, 10, 10]
    finally:
        stop.set()
        monitor.join()
    assert 2 * SIZE < max(seen) <= bound


def test_a_download_waits_while_those_of_others_fill_the_cache(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    store = make(cache_bytes=SIZE + SIZE // 2)
    for i in range(3):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    stop, seen = threading.Event(), list[int]()
    monitor = threading.Thread(target=largest_seen, args=[cache, stop, seen])
    monitor.start()
    try:
        assert run_together(3, lambda i: content(store, shard_of(i)) == body_of(i)) == [True] * 3
    finally:
        stop.set()
        monitor.join()
    assert max(seen) == SIZE


def test_the_least_recently_used_goes_first_and_stays_readable_where_open(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    store = make(cache_bytes=3 * SIZE)
    for i in (1, 2, 3):
        os.close(store.open(shard_of(i)))
        os.utime(cache / f"{shard_of(i).sha256}.tar", (i, i))
    os.close(store.open(shard_of(1)))  # used now: 2 is the oldest
    two = os.open(cache / f"{shard_of(2).sha256}.tar", os.O_RDONLY)
    os.close(store.open(shard_of(4)))
    left = {p.name for p in cache.glob("*.tar")}
    assert left == {f"{shard_of(i).sha256}.tar" for i in (1, 3, 4)}
    assert os.pread(two, SIZE, 0) == body_of(2)
    os.close(two)


def test_a_shard_larger_than_the_cache_names_the_flag(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    with pytest.raises(BadInput, match=rf"{server.url}/data/s-1\.tar has 200000 bytes.*stream\.cache_gib"):
        make(cache_bytes=SIZE - 1).open(shard_of(1))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_evicts_and_then_is_a_sentence(
    make: Callable[..., CachedStore], cache: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store, room = make(), [2]
    real = getattr(os, call)

    def limited(*arguments: Any) -> Any:
        if len(list(cache.glob("*.tar"))) >= room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, limited)
    for i in range(4):
        assert content(store, shard_of(i)) == body_of(i)
    assert len(list(cache.glob("*.tar"))) == 2
    room[0] = 0
    with pytest.raises(BadInput, match=r"cannot take the 200000 bytes of http.* \(No space left.*stream\.cache"):
        store.open(shard_of(5))


def test_a_damaged_file_is_fetched_again(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache / f"{shard_of(1).sha256}.tar"
    os.close(make().open(shard_of(1)))
    flipped = bytearray(path.read_bytes())
    flipped[SIZE // 2] ^= 1
    path.write_bytes(flipped)
    assert content(make(), shard_of(1)) == body_of(1)  # another process: the first look is by sha256
    path.write_bytes(body_of(1)[:-1])
    assert content(make(), shard_of(1)) == body_of(1)
    store = make()
    assert content(store, shard_of(1)) == body_of(1)
    os.truncate(path, SIZE - 1)  # after this process has checked it
    assert content(store, shard_of(1)) == body_of(1)
    assert server.requests["/data/s-1.tar"] == 4
    assert caplog.text.count("is damaged") == 3


# ---------------------------------------------------------------------------------------------- prefetch


def test_prefetch_fetches_in_the_background_and_open_finds_it(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    for i in range(4):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    store = make()
    for _ in range(5):  # streams name the same shards
        store.prefetch([shard_of(i) for i in range(4)])
    assert store._process().queue.qsize() <= 4
    assert content(store, shard_of(0)) == body_of(0)  # on its way: waited for, not fetched twice
    wait_for(lambda: len(list(cache.glob("*.tar"))) == 4)
    assert content(store, shard_of(3)) == body_of(3)
    assert server.requests == {f"/data/s-{i}.tar": 1 for i in range(4)}
    store.close()


def test_prefetch_never_raises_and_leaves_the_sentence_to_open(
    server: FaultyServer, make: Callable[..., CachedStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.prefetch([ShardInfo("none.tar", 1, 5, "0" * 64), shard_of(1)])
    wait_for(lambda: "prefetch: " in caplog.text)
    wait_for(lambda: not store._process().pending)
    with pytest.raises(BadInput, match=r"none\.tar does not exist"):
        store.open(ShardInfo("none.tar", 1, 5, "0" * 64))
    assert content(store, shard_of(1)) == body_of(1)
    assert server.requests["/data/s-1.tar"] == 1


def test_prefetch_asks_for_no_more_than_half_of_the_cache(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    for i in range(10):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    store = make(cache_bytes=6 * SIZE)
    store.prefetch([shard_of(i) for i in range(10)])
    assert list(store._process().pending) == [shard_of(i).sha256 for i in range(3)]
    wait_for(lambda: not store._process().pending)
    assert set(server.requests) == {f"/data/s-{i}.tar" for i in range(3)}


def test_close_forgets_what_was_to_be_prefetched(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    for i in range(6):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    store = make()
    store.prefetch([shard_of(i) for i in range(6)])
    wait_for(lambda: len(server.requests) == cache_module.PREFETCH_THREADS)
    store.close()
    wait_for(lambda: not store._process().pending)
    assert len(server.requests) == cache_module.PREFETCH_THREADS
    assert content(store, shard_of(5)) == body_of(5)  # still of use


def test_prefetch_and_connections_of_a_parent_do_not_stop_its_children(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    for i in range(4):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    store = make()
    shards = [shard_of(i) for i in range(6)]
    store.prefetch(shards[:4])  # under way while the children are forked

    def child(i: int) -> bool:
        store.prefetch(shards)
        return all(content(store, shard) == body_of(k) for k, shard in enumerate(shards))

    assert run_together(3, child) == [True] * 3
    assert max(server.requests.values()) == 1


def test_garbage_of_the_parent_does_not_delay_a_child(make: Callable[..., CachedStore]) -> None:
    # To collect a file system of fsspec closes its connections in its event loop, and waits 0.1 s for one that is gone.
    gc.disable()
    try:
        for _ in range(20):
            make().read("manifest.json")
        store = make()

        def child(_: int) -> int:
            gc.collect()
            store.read("manifest.json")
            return len(cache_module._inherited)

        # Kept alive in the child, so that nothing waits for the parent's loop; without it the collection took 2 s.
        assert run_together(1, child)[0] >= 20  # and those of other tests
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------- S3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """s3(endpoint) sends all S3 requests to an endpoint."""

    def point(endpoint: str) -> None:
        monkeypatch.setattr(cache_module, "BACKOFF_S", 0.02)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    return point


def test_s3_of_moto(s3: Callable[[str], None], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3(f"http://{host}:{port}")
        monkeypatch.setattr(cache_module, "BLOCK", 64_000)  # several ranges a shard
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for i in range(3):
            client.put_object(Bucket="bucket", Key=f"data/s-{i}.tar", Body=body_of(i))
        client.put_object(Bucket="bucket", Key="data/manifest.json", Body=b"{}")
        store = open_store("s3://bucket/data/", cache=str(cache), retries=1, timeout_s=10)
        assert store.read("manifest.json") == b"{}"
        shards = [shard_of(i) for i in range(3)]
        assert content(store, shards[0]) == body_of(0)
        assert run_together(2, lambda i: content(store, shards[1 + i]) == body_of(1 + i)) == [True] * 2
        for name in ("none.json", "s-9.tar"):
            with pytest.raises(BadInput, match=rf"s3://bucket/data/{name} does not exist"):
                store.open(shard_of(9)) if name.endswith("tar") else store.read(name)
        client.put_object(Bucket="bucket", Key="data/s-2.tar", Body=body_of(2)[:-1000])
        (cache / f"{shards[2].sha256}.tar").unlink()
        with pytest.raises(
            BadInput, match=r"s3://bucket/data/s-2\.tar could not be read in 2 tries.*ended after 199000"
        ):
            store.open(shards[2])
    finally:
        server.stop()


def test_s3_faults_are_retried_once_a_try(s3: Callable[[str], None], server: FaultyServer, cache: Path) -> None:
    pytest.importorskip("s3fs")
    s3(server.url)
    path = "/data/s-1.tar"  # bucket "data"
    store = open_store("s3://data", cache=str(cache), retries=5, timeout_s=0.5)
    server.faults[path] = ["500", "503", "truncated", "reset", "stall"]
    began = time.monotonic()
    assert content(store, shard_of(1)) == body_of(1)
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
    assert time.monotonic() - began < 5
    assert not server.requests


# ---------------------------------------------------------------------------------------------- Google


def test_gs_faults_are_retried_once_a_try(monkeypatch: pytest.MonkeyPatch, server: FaultyServer, cache: Path) -> None:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    monkeypatch.setattr(cache_module, "BACKOFF_S", 0.02)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    one, two = (f"/download/storage/v1/b/bucket/o/data%2Fs-{i}.tar" for i in (1, 2))
    server.files = {one: body_of(1), two: body_of(2)}
    server.faults = {one: ["503", "truncated", "reset", "stall"], two: ["silent", "always"]}
    store = open_store("gs://bucket/data", cache=str(cache), retries=4, timeout_s=0.4)
    assert content(store, shard_of(1)) == body_of(1)
    assert server.requests[one] == 5
    with pytest.raises(BadInput, match=r"gs://bucket/data/s-2\.tar could not be read in 5 tries .*nothing came within"):
        store.open(shard_of(2))
    assert server.requests[two] == 5
    server.faults = {two: ["403"]}
    with pytest.raises(BadInput, match=r"gs://bucket/data/s-2\.tar may not be read"):
        store.open(shard_of(2))
    with pytest.raises(BadInput, match=r"gs://bucket/data/s-3\.tar does not exist"):
        store.open(shard_of(3))
    assert run_together(2, lambda i: content(store, shard_of(2)) == body_of(2)) == [True] * 2
