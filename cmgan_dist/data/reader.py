"""Samples of one split by (shard, index): read by their offsets, parsed, and checked against the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import BinaryIO, cast

import numpy as np

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.cache import open_store
from cmgan_dist.data.folder import MOST_FILE_BYTES
from cmgan_dist.data.index import ShardIndex, index_name, write_anew
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest
from cmgan_dist.data.sample import Sample
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import ShardStore
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput, BadSample, shown

INDEX_THREADS = 16
"""Sidecars that are read at a time: from a URL each waits for an answer."""
KEPT_BYTES = 256 << 20
"""Of samples with image features that a reader keeps once they are parsed: in later epochs that is most of reading."""
PIECE = 1 << 18
"""Bytes that are read at a time where samples follow each other; much more is slower: fresh memory each time."""


def open_data_set(data: str, config: StreamConfig | None = None) -> tuple[ShardStore, Manifest]:
    """Return the files of a data set, and what it holds.

    `data`: folder or URL; `config` says how a URL is read and where its shards are kept. Raises BadInput when the data
    set cannot be read."""
    remote = config or StreamConfig()
    store = open_store(
        data,
        cache=remote.cache or None,
        cache_bytes=int(remote.cache_gib * 2**30),
        retries=remote.retries,
        timeout_s=remote.timeout_s,
    )
    return store, Manifest.from_json(store.read(MANIFEST_NAME), store.location(MANIFEST_NAME))


class _Piece:
    """A piece of a shard, as a file that is read forward only."""

    def __init__(self, read: Callable[[int, int], bytes], start: int, stop: int) -> None:
        self._read, self.at, self.stop = read, start, stop

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer where the piece ends."""
        data = self._read(self.at, min(self.at + size, self.stop))
        self.at += len(data)
        return data


class ShardReader:
    """The samples of one split of a data set, read one by one or all in order. Threads may share it."""

    def __init__(
        self,
        data: str,
        split: str,
        config: StreamConfig | None = None,
        *,
        open_files: int = 64,
        indexes: int = 1024,
        opened: tuple[ShardStore, Manifest] | None = None,
    ) -> None:
        """`data`: folder or URL; `config` says how a URL is read and where its shards are kept; `opened`: what
        `open_data_set` returned of it.

        At most `open_files` shards are open and `indexes` sidecars in memory at a time. Raises BadInput when the data
        set cannot be read or the split is missing, empty or incomplete."""
        self.store, self.manifest = opened or open_data_set(data, config)
        self.data, self.split = data, split
        self.place = public_url(data)
        """The folder or URL for messages."""
        self.judge = Judge.of(self.manifest)
        self.shards = self.manifest.shards(split, self.place)
        for shard in self.shards:
            if shard.samples == 0:
                location = self.store.location(shard.name)
                raise BadInput(f"shard {location} is empty: remove it and {write_anew(self.place)}")
        self.store.check(self.shards)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._open_files = open_files
        self._lock = threading.Lock()
        self.index = lru_cache(maxsize=indexes)(self._read_index)
        """Number of a shard -> its sidecar. Raises BadInput when that is missing or not the shard's."""
        self._indexed: set[int] = set()
        self._kept: dict[tuple[int, int], Sample] = {}
        self._room = KEPT_BYTES

    def of(self, split: str) -> ShardReader:
        """Return a reader of another split, by the manifest that this one has read. Raises BadInput as this did."""
        return ShardReader(self.data, split, opened=(self.store, self.manifest))

    def read_ahead(self, rows: Sequence[int], later: Sequence[int]) -> None:
        """Have shards fetched at a time, those of `rows` first, and read the sidecars of `rows`, which are read next.

        Raises BadInput when a sidecar is missing or not the shard's."""
        absent = [shard for shard in rows if shard not in self._files]
        self.store.prefetch([self.shards[shard] for shard in dict.fromkeys([*absent, *later])])
        missing = [shard for shard in rows if shard not in self._indexed]
        if len(missing) > 1:
            for _ in self._indexes(missing):
                pass
        self._indexed.update(missing)

    def _indexes(self, shards: Iterable[int]) -> Iterator[ShardIndex]:
        """Yield the sidecars of shards in their order, several read at a time."""
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            yield from pool.map(self.index, shards)

    @property
    def counts(self) -> np.ndarray:
        """int64 [shards]: samples of each shard."""
        return np.asarray([s.samples for s in self.shards], dtype=np.int64)

    def _read_index(self, shard: int) -> ShardIndex:
        name = index_name(self.shards[shard].name)
        data, listed = self.store.read(name), self.shards[shard].index_sha256
        index = ShardIndex.from_bytes(data, self.store.location(name), self.place)
        if len(index) != self.shards[shard].samples:
            raise BadInput(
                f"{self.store.location(name)} lists {len(index)} samples, the manifest {self.shards[shard].samples}: "
                f"{write_anew(self.place)}"
            )
        if index.offsets[-1] > self.shards[shard].bytes:
            raise BadInput(f"{self.store.location(name)} is damaged: {write_anew(self.place)}")
        if listed and hashlib.sha256(data).hexdigest() != listed:
            raise BadInput(
                f"{self.store.location(name)} has another checksum than the manifest says: {write_anew(self.place)}"
            )
        return index

    def _descriptor(self, shard: int) -> int:
        """Return an open descriptor of a shard; the least recently used one is closed for it when need be."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= self._open_files:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = self.store.open(self.shards[shard])
        return self._files[shard]

    def _bytes(self, shard: int, start: int, stop: int) -> bytes:
        """Return the bytes start..stop of a shard, fewer where it ends."""
        with self._lock:  # another thread could close the descriptor before it is read
            while True:
                file = self._descriptor(shard)
                data = os.pread(file, stop - start, start)
                if len(data) == stop - start or os.fstat(file).st_nlink:
                    return data
                os.close(self._files.pop(shard))  # it was evicted from the cache: have it fetched again

    def raw(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """Return (key, members by extension) of a sample, nothing parsed. Raises BadSample, naming shard and reason."""
        sidecar, name = self.index(shard), self.shards[shard].name
        start, stop = sidecar.offsets[index : index + 2].tolist()
        large = stop - start > MOST_FILE_BYTES
        data = b"" if large else self._bytes(shard, start, stop)
        if len(data) < stop - start and not large:
            raise BadSample(f"{name} sample {index}: the shard is truncated at byte {start + len(data)}")
        row = sidecar.layouts[index].tolist()
        if not large and (found := sidecar.slice_members(row, data, data)):
            return found
        file = cast(BinaryIO, _Piece(partial(self._bytes, shard), start, stop)) if large else io.BytesIO(data)
        for key, _, members in self._walk(file, name, index):  # the first one; or it says where damage is
            if row[0] and not large:
                raise BadSample(f"{name} sample {index}: byte {start} has other headers than those that were indexed")
            return key, members
        raise BadSample(f"{name} sample {index}: nothing at byte {start}")

    def _walk(self, file: BinaryIO, name: str, index: int) -> Iterator[tuple[str, int, dict[str, bytes]]]:
        """Yield what `iter_samples` yields. Raises BadSample, naming shard and sample."""
        try:
            yield from iter_samples(file, name)
        except BadSample as error:
            reason = str(error)
            raise BadSample(reason if reason.startswith(name) else f"{name} sample {index}: {reason}") from None

    def read(self, shard: int, index: int) -> Sample:
        """Return a sample. Raises BadSample, naming shard and reason, when it cannot be used.

        Those with image features are kept while KEPT_BYTES last; of pictures it is decoding that takes time."""
        if (kept := self._kept.get((shard, index))) is not None:
            return kept
        sample = self._parse(shard, *self.raw(shard, index))
        if self._room > 0 and not isinstance(sample.image, bytes):
            self._room -= sample.nbytes
            self._kept[shard, index] = sample
        return sample

    def _parse(self, shard: int, key: str, members: dict[str, bytes]) -> Sample:
        """Return the sample of its members. Raises BadSample when it cannot be used or does not fit the manifest."""
        try:
            return self.judge.read(key, members)
        except BadSample as error:
            raise BadSample(f"{self.shards[shard].name} sample {shown(key)}: {error}") from None

    def raw_samples(self) -> Iterator[tuple[int, str, dict[str, memoryview]]]:
        """Yield (shard, key, members by extension) of every whole sample in canonical order, read in large pieces.

        The members are views: one that is kept keeps its piece, PIECE bytes or the whole sample."""
        for shard in range(len(self.shards)):
            sidecar, first = self.index(shard), 0
            while first < len(sidecar):
                start = int(sidecar.offsets[first])
                stop = max(first + 1, int(np.searchsorted(sidecar.offsets, start + PIECE, side="right")) - 1)
                large = int(sidecar.offsets[stop]) - start > MOST_FILE_BYTES  # one sample, which `raw` reads
                data = b"" if large else self._bytes(shard, start, int(sidecar.offsets[stop]))
                whole, view = len(data), memoryview(data)
                starts = (sidecar.offsets[first : stop + 1] - start).tolist()
                for i, row in enumerate(sidecar.layouts[first:stop].tolist()):
                    found = sidecar.slice_members(row, data, view, starts[i]) if starts[i + 1] <= whole else None
                    if found:
                        yield shard, *found
                        continue
                    with contextlib.suppress(BadSample):
                        key, members = self.raw(shard, first + i)
                        yield shard, key, {extension: memoryview(member) for extension, member in members.items()}
                first = stop

    def __iter__(self) -> Iterator[Sample]:
        """Yield every usable sample in canonical order; bad ones are passed over: training and evaluation name them."""
        for shard, key, members in self.raw_samples():
            with contextlib.suppress(BadSample):
                yield self._parse(shard, key, {extension: bytes(member) for extension, member in members.items()})

    def samples_by_class(self) -> list[np.ndarray]:
        """Return per class the (shard, index) of its samples, int64 [n, 2], from the sidecars."""
        shard_of, index_of, label_of = [], [], []
        for shard, index in enumerate(self._indexes(range(len(self.shards)))):
            per_sample = np.diff(index.label_starts)
            label_of.append(index.label_values)
            index_of.append(np.repeat(np.arange(len(index)), per_sample))
            shard_of.append(np.full(len(index.label_values), shard))
        samples = np.stack([np.concatenate(shard_of), np.concatenate(index_of)], 1).astype(np.int64)
        labels = np.concatenate(label_of)
        return [samples[labels == c] for c in range(len(self.manifest.classes))]

    def close(self) -> None:
        """Close the shards that are open; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
