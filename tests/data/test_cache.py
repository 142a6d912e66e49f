"""The bounded folder that processes share, in front of an HTTP server on loopback."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data import shared_file
from cmgan_dist.data.cache import PREFETCH_THREADS, CachedStore, open_store
from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.stream import Stream
from cmgan_dist.errors import BadInput
from tests.services.faulty_server import FaultyServer
from tests.toy import (
    FORK,
    SHARD_BYTES,
    body_of,
    content_of,
    index_tar,
    make_features,
    run_together,
    shard_of,
    wait_for,
    write_manifest,
    write_tar,
)

# ---------------------------------------------------------------------------------------------- the folder


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


# ---------------------------------------------------------------------------------------------- fetching


def test_a_shard_is_fetched_once_and_named_by_content(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    server.files["/other/s-1.tar"] = body_of(1)
    assert make().read("manifest.json") == b'{"a": 1}'
    assert content_of(make(), shard_of(1)) == body_of(1)
    assert content_of(make(), shard_of(1)) == body_of(1)
    assert content_of(make("/other"), shard_of(1)) == body_of(1)
    assert server.requests == {"/data/manifest.json": 1, "/data/s-1.tar": 1}
    names = sorted(p.name for p in cache.iterdir() if not p.name.startswith(".manifest-"))
    assert names == [".lock", f"{shard_of(1).sha256}.tar"]


def test_a_shard_is_on_disk_before_it_has_its_name(
    make: Callable[..., CachedStore], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: names.append(sorted(p.name[:6] for p in cache.iterdir())))
    os.close(make().open(shard_of(1)))
    assert names == [[".lock", ".part-"]]


def test_a_manifest_without_checksum_is_refused(make: Callable[..., CachedStore]) -> None:
    for sha256 in ("", "../../" + "a" * 58):
        with pytest.raises(BadInput, match="no bytes or sha256"):
            make().open(ShardInfo("s-1.tar", 1, SHARD_BYTES, sha256))


# ---------------------------------------------------------------------------------------------- processes


def test_processes_that_want_one_shard_fetch_it_once(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/s-1.tar"] = ["slow"]
    store = make()
    store.read("manifest.json")  # the parent's connections and threads must not disturb the children
    shard = shard_of(1)
    assert run_together(5, lambda i: content_of(store, shard) == body_of(1)) == [True] * 5
    assert server.requests["/data/s-1.tar"] == 1


def test_a_shard_that_came_between_the_look_and_the_lock_is_not_fetched_again(
    server: FaultyServer, make: Callable[..., CachedStore], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    os.close(make().open(shard_of(1)))
    store, looks = make(), [None]
    look = store.cached
    monkeypatch.setattr(store, "cached", lambda shard: looks.pop() if looks else look(shard))
    assert content_of(store, shard_of(1)) == body_of(1)
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
    assert time.monotonic() - began < store.source.dead_after_s + 5  # of a busy machine


@pytest.mark.parametrize("waiting", [False, True])
def test_kill_9_leaves_nothing_half_and_the_next_succeeds(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, waiting: bool
) -> None:
    server.faults["/data/s-1.tar"] = ["stall"]
    store, shard = make(timeout_s=15.0), shard_of(1)
    victim = FORK.Process(target=store.open, args=[shard])
    victim.start()
    assert server.half_sent.wait(10)
    wait_for(lambda: bool(list(cache.glob(".part-*"))))
    results: list[bytes] = []
    waiter = threading.Thread(target=lambda: results.append(content_of(store, shard)))
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
    store = make(cache_bytes=SHARD_BYTES)
    leftover = cache / f".part-{shard_of(2).sha256}"
    leftover.write_bytes(b"x" * SHARD_BYTES)
    assert content_of(store, shard_of(1)) == body_of(1)
    assert not leftover.exists()


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    server.faults["/data/s-1.tar"] = ["stall"]
    store, shard = make(timeout_s=15.0), shard_of(1)
    child_pid = FORK.SimpleQueue()

    def parent() -> None:
        threading.Thread(target=store.open, args=[shard], daemon=True).start()
        wait_for(lambda: bool(shared_file.held_locks))
        time.sleep(0.1)
        pid = os.fork()
        if not pid:
            time.sleep(15)
            os._exit(0)
        child_pid.put(pid)
        time.sleep(15)

    process = FORK.Process(target=parent)
    process.start()
    orphan = child_pid.get()
    try:
        assert server.half_sent.wait(10)
        process.kill()
        process.join()
        began = time.monotonic()
        assert content_of(store, shard) == body_of(1)
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
    bound = 3 * SHARD_BYTES + 1000
    store = make(cache_bytes=bound)
    shards = [shard_of(i) for i in range(10)]

    def read_all(start: int) -> int:
        order = [(start * 3 + k * 7) % 10 for k in range(10)]
        return sum(content_of(store, shards[i]) == body_of(i) for i in order)

    stop, seen = threading.Event(), list[int]()
    monitor = threading.Thread(target=largest_seen, args=[cache, stop, seen])
    monitor.start()
    try:
        assert run_together(3, read_all) == [10, 10, 10]
    finally:
        stop.set()
        monitor.join()
    assert 2 * SHARD_BYTES < max(seen) <= bound


def test_a_download_waits_while_those_of_others_fill_the_cache(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    store = make(cache_bytes=SHARD_BYTES + SHARD_BYTES // 2)
    for i in range(3):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    stop, seen = threading.Event(), list[int]()
    monitor = threading.Thread(target=largest_seen, args=[cache, stop, seen])
    monitor.start()
    try:
        assert run_together(3, lambda i: content_of(store, shard_of(i)) == body_of(i)) == [True] * 3
    finally:
        stop.set()
        monitor.join()
    assert max(seen) == SHARD_BYTES


def test_the_least_recently_used_goes_first_and_keeps_no_space_where_it_is_open(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    store = make(cache_bytes=3 * SHARD_BYTES)
    for i in (1, 2, 3):
        os.close(store.open(shard_of(i)))
        os.utime(cache / f"{shard_of(i).sha256}.tar", (i, i))
    os.close(store.open(shard_of(1)))  # used now: 2 is the oldest
    two = os.open(cache / f"{shard_of(2).sha256}.tar", os.O_RDONLY)
    os.close(store.open(shard_of(4)))
    left = {p.name for p in cache.glob("*.tar")}
    assert left == {f"{shard_of(i).sha256}.tar" for i in (1, 3, 4)}
    assert (os.fstat(two).st_size, os.fstat(two).st_nlink) == (0, 0)
    os.close(two)


def test_readers_of_more_shards_than_fit_stay_within_the_bound(server: FaultyServer, cache: Path) -> None:
    names = [f"s-{i}.tar" for i in range(4)]
    folder = cache.parent / "made"
    folder.mkdir()
    for name in names:
        write_tar(folder / name, [(f"{name[:3]}x{k}.{e}", os.urandom(9000)) for k in range(3) for e in ("png", "jpg")])
    write_manifest(folder, {"train": [index_tar(folder / name) for name in names]})
    server.files = {f"/d/{path.name}": path.read_bytes() for path in folder.iterdir()}
    size = len(server.files["/d/s-0.tar"])
    config = StreamConfig(cache=str(cache), cache_gib=2.5 * size / 2**30)
    reader = ShardReader(f"{server.url}/d", "train", config)
    for _ in range(2):
        for shard in range(4):
            for i in range(3):
                key, members = reader.raw(shard, i)
                assert (key, len(members)) == (f"s-{shard}x{i}", 2)
    held = {os.fstat(file).st_ino: os.fstat(file).st_blocks * 512 for file in reader._files.values()}
    held |= {path.stat().st_ino: path.stat().st_blocks * 512 for path in cache.iterdir()}
    assert sum(held.values()) <= 2.5 * size + 4096 * len(held)
    reader.close()


def test_a_shard_larger_than_the_cache_names_the_flag(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    with pytest.raises(BadInput, match=rf"{server.url}/data/s-1\.tar has 200000 bytes.*stream\.cache_gib"):
        make(cache_bytes=SHARD_BYTES - 1).open(shard_of(1))


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
        assert content_of(store, shard_of(i)) == body_of(i)
    assert len(list(cache.glob("*.tar"))) == 2
    room[0] = 0
    with pytest.raises(BadInput, match=r"cannot take the 200000 bytes of http.* \(No space left.*XDG_CACHE_HOME"):
        store.open(shard_of(5))


def test_a_damaged_file_is_fetched_again(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache / f"{shard_of(1).sha256}.tar"
    os.close(make().open(shard_of(1)))
    flipped = bytearray(path.read_bytes())
    flipped[SHARD_BYTES // 2] ^= 1
    path.write_bytes(flipped)
    assert content_of(make(), shard_of(1)) == body_of(1)  # another process: the first look is by sha256
    path.write_bytes(body_of(1)[:-1])
    assert content_of(make(), shard_of(1)) == body_of(1)
    store = make()
    assert content_of(store, shard_of(1)) == body_of(1)
    os.truncate(path, SHARD_BYTES - 1)  # after this process has checked it
    assert content_of(store, shard_of(1)) == body_of(1)
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
    assert store.background.queue.qsize() <= 4
    assert content_of(store, shard_of(0)) == body_of(0)  # on its way: waited for, not fetched twice
    wait_for(lambda: len(list(cache.glob("*.tar"))) == 4)
    assert content_of(store, shard_of(3)) == body_of(3)
    assert server.requests == {f"/data/s-{i}.tar": 1 for i in range(4)}
    store.close()


def test_prefetch_never_raises_and_leaves_the_sentence_to_open(
    server: FaultyServer, make: Callable[..., CachedStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.prefetch([ShardInfo("none.tar", 1, 5, "0" * 64), shard_of(1)])
    wait_for(lambda: "prefetch: " in caplog.text)
    wait_for(lambda: not store.background.pending)
    with pytest.raises(BadInput, match=r"none\.tar does not exist"):
        store.open(ShardInfo("none.tar", 1, 5, "0" * 64))
    assert content_of(store, shard_of(1)) == body_of(1)
    assert server.requests["/data/s-1.tar"] == 1


def test_prefetch_asks_for_no_more_than_half_of_the_cache(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    for i in range(10):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    store = make(cache_bytes=6 * SHARD_BYTES)
    store.prefetch([shard_of(i) for i in range(10)])
    assert list(store.background.pending) == [shard_of(i).sha256 for i in range(3)]
    wait_for(lambda: not store.background.pending)
    assert set(server.requests) == {f"/data/s-{i}.tar" for i in range(3)}


def test_close_forgets_what_was_to_be_prefetched(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    for i in range(10):
        server.faults[f"/data/s-{i}.tar"] = ["slow"]
    store = make()
    store.prefetch([shard_of(i) for i in range(10)])
    wait_for(lambda: len(server.requests) == PREFETCH_THREADS)
    store.close()
    wait_for(lambda: not store.background.pending)
    assert len(server.requests) == PREFETCH_THREADS
    assert content_of(store, shard_of(9)) == body_of(9)  # still of use


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
        return all(content_of(store, shard) == body_of(k) for k, shard in enumerate(shards))

    assert run_together(3, child) == [True] * 3
    assert max(server.requests.values()) == 1


def test_a_cache_that_is_too_small_is_told_of_once(
    make: Callable[..., CachedStore], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(cache_bytes=2 * SHARD_BYTES)
    for i in (1, 2, 3):
        os.close(store.open(shard_of(i)))
    damaged = cache / f"{shard_of(3).sha256}.tar"
    damaged.write_bytes(b"x")
    os.close(store.open(shard_of(3)))
    assert "is fetched again: " not in caplog.text
    for i in (1, 2, 3, 1):
        os.close(store.open(shard_of(i)))
    told = [line for line in caplog.messages if "is fetched again: " in line]
    assert len(told) == 1
    assert told[0].endswith("set stream.cache_gib to the size of the data set")


# ---------------------------------------------------------------------------------------------- the manifest


def test_a_node_fetches_the_manifest_once(server: FaultyServer, make: Callable[..., CachedStore]) -> None:
    server.faults["/data/manifest.json"] = ["slow"]
    assert run_together(5, lambda i: make().read("manifest.json")) == [b'{"a": 1}'] * 5
    assert server.requests["/data/manifest.json"] == 1


def test_a_manifest_that_was_read_before_this_process_began_is_read_anew(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    for began in (3600.0, 90.0):
        assert make().read("manifest.json") == server.files["/data/manifest.json"]
        server.files["/data/manifest.json"] = f'{{"a": {began}}}'.encode()
        (copy,) = cache.glob(".manifest-*")
        os.utime(copy, (time.time() - began,) * 2)
        assert make().read("manifest.json") == server.files["/data/manifest.json"]
    assert server.requests["/data/manifest.json"] == 3


@pytest.mark.parametrize("damage", [b"", b"\0" * 10, b"x" * 40])
def test_a_damaged_copy_of_a_manifest_is_not_taken(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, damage: bytes
) -> None:
    make().read("manifest.json")
    (copy,) = cache.glob(".manifest-*")
    copy.write_bytes(damage)
    assert make().read("manifest.json") == b'{"a": 1}'


def test_those_who_wait_for_a_manifest_fail_with_the_first(
    server: FaultyServer, make: Callable[..., CachedStore]
) -> None:
    server.faults["/data/manifest.json"] = ["stall", "always"]
    said = run_together(4, lambda i: make(timeout_s=0.7, retries=1).read("manifest.json"))
    assert len(set(said)) == 1
    assert "manifest.json could not be read in 2 tries" in said[0]
    assert server.requests["/data/manifest.json"] == 2
    server.faults.clear()
    assert make().read("manifest.json") == b'{"a": 1}'  # the next one tries itself


def test_old_copies_of_manifests_are_removed_when_room_is_made(make: Callable[..., CachedStore], cache: Path) -> None:
    make().read("manifest.json")
    (copy,) = cache.glob(".manifest-*")
    content_of(make(), shard_of(1))
    assert copy.exists()
    os.utime(copy, (time.time() - 3600,) * 2)
    content_of(make(), shard_of(2))
    assert not copy.exists()


# ---------------------------------------------------------------------------------------------- the first batch


def test_the_first_batch_asks_for_many_files_at_a_time_and_for_each_once(
    server: FaultyServer, cache: Path, tmp_path: Path
) -> None:
    data = make_features(tmp_path / "data", splits={"train": [20] * 12, "val": [8]}, dims=(6, 5))
    for path in data.iterdir():
        server.files[f"/data/{path.name}"] = path.read_bytes()
        server.faults[f"/data/{path.name}"] = ["slow"]
    config = StreamConfig(global_batch=24, logical_streams=12, window=1, cache=str(cache))
    stream = Stream(f"{server.url}/data", config, seed=0)
    next(stream.batches(0))
    stream.readers[0].of("val")
    needed = {ref.shard for s in range(12) for ref in stream.plan.chunk_rows(0, s)}
    names = [stream.readers[0].shards[shard].name for shard in needed]
    assert set(names) <= {path.removeprefix("/data/") for path in server.requests}
    assert set(server.requests.values()) == {1}
    assert server.most_at_once >= 6


def test_connections_that_are_closed_do_not_end_what_is_fetched_ahead(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp raises RuntimeError then, as asyncio does when the interpreter ends: no thread may die of it."""
    store, left = make(), ["Connection closed."]
    fetch = store._fetch

    def closed_once(shard: ShardInfo, part: int) -> None:
        if left:
            raise RuntimeError(left.pop())
        fetch(shard, part)

    monkeypatch.setattr(store, "_fetch", closed_once)
    store.prefetch([shard_of(1)])
    wait_for(lambda: len(list(cache.glob("*.tar"))) == 1)
