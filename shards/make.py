"""One shard of raw pairs: made, or found as an earlier run or another task made it.

Beside each tar lies its record, ``train-000000.build.json``: the content that it was made from, how, and what was
written. It is written last, so a run that was killed goes on behind the last shard whose record agrees with its bytes
and with what the pairs hold now."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import LabelKind, ShardInfo
from cmgan_dist.data.output import abandon_record, is_done, read_record, write_record
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadSample
from cmgan_dist.jobs import ledger
from cmgan_dist.jobs.local import units_done
from shards.pairs import RawPair, Readable
from shards.plan import PlannedShard
from shards.shard_file import Members, finished_record, has_index, put_shard, read_members, try_sample
from shards.urls import UrlBytes

READ_AT_A_TIME = 16
"""Pictures by URL that one process waits for."""
Made = tuple[ShardInfo | None, list[str]]
"""What was written for a shard (None when no pair was good), and a line for each pair left out."""


@dataclass(frozen=True)
class Making:
    """What decides the bytes of a shard beside its pairs."""

    label_kind: LabelKind
    classes: int
    """How many there are."""
    skip_bad: bool

    def settings(self, shard: PlannedShard) -> dict[str, Any]:
        """Return the settings for the record of a shard."""
        return {**asdict(self), "plan": shard.digest}


def record_name(shard: str) -> str:
    """Return the name of a shard's record: ``train-000000.build.json`` for ``train-000000.tar``."""
    return shard.removesuffix(".tar") + ".build.json"


def files_of_shard(shard: str) -> list[str]:
    """Return the names of all files that packing writes for a shard."""
    return [shard, index_name(shard), record_name(shard)]


def content_sha256(pairs: list[RawPair]) -> str:
    """Return the SHA-256 of all that the samples of some pairs are made from: files are read, their times do not
    matter. What cannot be read counts as why it cannot."""
    digest = hashlib.sha256()
    for pair in pairs:
        parts = [_identity(pair.image), _identity(pair.texts)]
        digest.update(json.dumps([pair.key, pair.split, pair.labels, *parts]).encode())
    return digest.hexdigest()


def _identity(part: Readable | tuple[str, ...] | np.ndarray) -> object:
    if isinstance(part, tuple):
        return part
    if isinstance(part, np.ndarray):
        return [part.shape, str(part.dtype), hashlib.sha256(part.tobytes()).hexdigest()]
    try:
        return part.identity()
    except BadSample as error:
        return f"bad: {error}"


def make_shard(output: str, plan: Path, shard: PlannedShard, how: Making) -> Made:
    """Read the pairs of a shard from the folder `plan` and write it: its tar and sidecar, then its record.

    `output`: folder or URL. Raises BadInput on a bad pair, unless they are skipped, and when the shard cannot be
    written."""
    store, name = FileStore(output, "--output"), record_name(shard.name)
    settings, pairs = how.settings(shard), shard.read(plan)
    left_out: list[str] = []

    def samples() -> Iterator[tuple[str, Members]]:
        for pair, result in _read_ahead(partial(read_members, label_kind=how.label_kind, classes=how.classes), pairs):
            members = try_sample(result, pair.where, how.skip_bad, left_out)
            units_done(1)
            if members is not None:
                yield pair.key, members

    try:
        # Read before the samples are: what changes between is found by the next run, and the shard made anew.
        source = content_sha256(pairs)
        write_record(store, name, ledger.Record(source, settings))
        info = put_shard(store, shard.name, samples())
        if info is None:  # what an earlier run made of other pairs is not this shard
            for other in (shard.name, index_name(shard.name)):
                store.remove(other)
        write_record(store, name, finished_record(source, settings, info, store, left_out))
    finally:
        abandon_record(store, name, shard.name)
    return info, left_out


def _read_ahead(
    read: Callable[[RawPair], Members], pairs: list[RawPair]
) -> Iterator[tuple[RawPair, Callable[[], Members]]]:
    """Yield each pair with what returns ``read(pair)``, or raises what that does; by URL, some are read at a time."""
    if not any(isinstance(pair.image, UrlBytes) for pair in pairs):
        yield from ((pair, partial(read, pair)) for pair in pairs)
        return
    waiting: deque[tuple[RawPair, Future[Members]]] = deque()
    with ThreadPoolExecutor(READ_AT_A_TIME) as pool:
        try:
            for pair in pairs:
                waiting.append((pair, pool.submit(read, pair)))
                if len(waiting) > 2 * READ_AT_A_TIME:
                    first, future = waiting.popleft()
                    yield first, future.result
            yield from ((pair, future.result) for pair, future in waiting)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Found:
    """What lies in the output for a planned shard."""

    made: Made | None = None
    """What was made of these pairs in this way, and is whole; None where the shard is to be made."""
    other: bool = False
    """Whether there is a shard of this name that was made from something else, or that nobody knows."""
    said: str = ""
    """What the user should know of it."""


def find_shard(output: str, plan: Path, shard: PlannedShard, how: Making, read_inputs: bool) -> Found:
    """Return what an earlier run, or another task, made of a shard, and whether it was damaged since.

    `output`: folder or URL; `plan`: folder of the plan; `read_inputs`: compare what the pairs hold now too, not only
    what was planned of them.
    Raises BadInput when a file is there and cannot be read."""
    store = FileStore(output, "--output")
    record = read_record(store, record_name(shard.name))
    if record is None or record.settings != how.settings(shard):
        return Found(other=store.size(shard.name) is not None)
    if not record.finished:
        return Found()
    if read_inputs and record.source != content_sha256(shard.read(plan)):
        return Found(other=True)
    return _whole(record, store, shard.name)


def _whole(record: ledger.Record, store: FileStore, name: str) -> Found:
    """Return what a finished record says was made, if its files are that still. Raises BadInput."""
    if record.written is None:
        return Found((None, record.left_out))
    info = ShardInfo(**record.written, index_sha256=record.beside[0]["sha256"])
    if is_done(store, record) and has_index(store, info):
        return Found((info, record.left_out))
    said = f"{store.location(name)} or its sidecar is not what its record says: it is made anew"
    return Found(said=said if store.size(name) is not None else "")
