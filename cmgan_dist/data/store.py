"""Where the files of a data set are: what every place can do, and a local folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from cmgan_dist.data.manifest import MANIFEST_NAME, ShardInfo
from cmgan_dist.errors import BadInput


class ShardStore(ABC):
    """Where the files of a data set are. One object may be used by several threads and by forked processes."""

    @abstractmethod
    def location(self, name: str) -> str:
        """The file's path or URL, for messages."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file (manifest, sidecar). Raises BadInput when it does not exist or cannot be read."""

    @abstractmethod
    def check(self, shards: Sequence[ShardInfo]) -> None:
        """Raises BadInput when a local shard is absent. A remote source is not asked: `open` says it."""

    @abstractmethod
    def open(self, shard: ShardInfo) -> int:
        """A descriptor for reading the whole shard; the caller closes it. Raises BadInput when there is none."""

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:  # noqa: B027 - nothing to do for a local folder
        """Start fetching shards that are needed soon, in this order, in the background. Never raises, never waits."""

    def close(self) -> None:  # noqa: B027
        """Forget what was to be prefetched, and end connections."""


class LocalStore(ShardStore):
    """A folder: its files are opened where they lie, neither copied nor checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def location(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        if not self.folder.is_dir():
            raise BadInput(f"data folder {self.folder} does not exist: pack one with 'python -m shards build'")
        path = self.folder / name
        if path.is_file():
            return path.read_bytes()
        if name == MANIFEST_NAME:
            raise BadInput(f"{self.folder} has no {name}: write it with 'python -m shards index {self.folder}'")
        raise BadInput(f"shard index {path} does not exist: run 'python -m shards index {self.folder}'")

    def check(self, shards: Sequence[ShardInfo]) -> None:
        for shard in shards:
            if not (self.folder / shard.name).is_file():
                raise BadInput(f"shard {self.folder / shard.name} is in the manifest but not in the folder: restore it")

    def open(self, shard: ShardInfo) -> int:
        try:
            return os.open(self.folder / shard.name, os.O_RDONLY)
        except FileNotFoundError:
            self.check([shard])
            raise
