"""The files that a plan was made from, as they were then: whoever finds the plan asks whether they are that still.

    files-PPPP.jsonl     path, size and times of each file that the rows of partition P name, left out or not

No byte of a shard depends on them: a plan that is made anew for nothing is the same plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from cmgan_dist.files import open_regular
from cmgan_dist.jobs.local import parallel_map
from shards.pairs import FileBytes, RawPair


def seen_name(number: int) -> str:
    """Return the name of the list of a partition's files."""
    return f"files-{number:04d}.jsonl"


def seen(pair: RawPair) -> Iterator[str]:
    """Yield a line for each file of a pair, as it is now: to be asked before the file is read."""
    for part in (pair.image, pair.texts):
        if isinstance(part, FileBytes):
            yield json.dumps([str(part.path), _state(str(part.path))]) + "\n"


def is_current(folder: Path, processes: int | None) -> bool:
    """Return whether all files that the plan in `folder` was made from are as they were, the missing ones missing."""
    lists = [folder / seen_name(number) for number in range(len(list(folder.glob("pairs-*.jsonl"))))]
    return all(parallel_map(_is_unchanged, [(path,) for path in lists], title="comparing files", processes=processes))


def _state(path: str) -> list[int] | None:
    """Return the size and times of a file, None where there is none to read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_unchanged(path: Path) -> bool:
    """Return whether the files of a list are as it says; not where the list is gone, with its plan."""
    try:
        with open_regular(path) as file:
            return all(_state(name) == was for name, was in map(json.loads, file))
    except (FileNotFoundError, ValueError):
        return False
