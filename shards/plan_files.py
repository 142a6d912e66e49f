"""Where a plan lies while it is needed: on disk in the output, beside the shards.

A plan that takes long is made once for all tasks and all starts, in ``.plan-STAMP``: the stamp is a hash of the tables
and options that it is made from, so tables that changed have another. Whoever comes second waits until it is made, and
uses it if the pictures are as they were; else a new plan lies beside it, in ``.plan-STAMP-1``. What makes a shard of a
plan reads it, so each stays until the data set is finished."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_sealed, read_bytes, sealed_json, write_atomic
from cmgan_dist.jobs.lock import owning_in_turn
from cmgan_dist.jobs.staging import staging
from shards.pairs import Draw, RawPairs
from shards.plan import Plan, PlannedShard
from shards.seen import is_current

PLAN_VERSION = 2
PLAN_NAME = "plan.json"
"""Written last into the folder of a plan."""
LOCK = "plan"
Make = Callable[[Path], tuple[RawPairs, Plan]]
"""Makes a plan in a folder."""


@contextlib.contextmanager
def planned(output: Path, stamp: str, make: Make, processes: int | None) -> Iterator[tuple[RawPairs, Plan]]:
    """Give what a source says and the plan: the one of this stamp that is there and holds, or one that is made.

    Without a `stamp` the plan is this process's own, and removed at the end. Raises what `make` does."""
    if stamp:
        found = _find(output, stamp, processes)
        if found is None:
            with owning_in_turn(output, LOCK):  # who had it may have made the plan
                found = _find(output, stamp, processes) or _make(_new_folder(output, stamp), make)
        yield found
        return
    with staging(output.absolute()) as folder:
        yield make(folder)


def _plans(output: Path, stamp: str = "") -> list[Path]:
    """Return the folders of plans, of one stamp or of all."""
    return sorted(output.absolute().glob(f".plan-{stamp[:16]}*"))


def were_renewed(output: Path) -> bool:
    """Return whether tasks of the data set have worked by different plans, as something changed between them."""
    return len(_plans(output)) > 1


def _find(output: Path, stamp: str, processes: int | None) -> tuple[RawPairs, Plan] | None:
    """Return the plan of this stamp whose files are as they were, None where there is none."""
    loaded = ((folder, _load(folder)) for folder in _plans(output, stamp))
    return next((found for folder, found in loaded if found is not None and is_current(folder, processes)), None)


def _new_folder(output: Path, stamp: str) -> Path:
    """Return a folder for a new plan; those that starts which were killed have left are removed, others may be read."""
    for folder in _plans(output, stamp):
        if _load(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
    name = f".plan-{stamp[:16]}"
    names = (f"{name}-{number}" if number else name for number in itertools.count())
    return next(folder for folder in map(output.absolute().joinpath, names) if not folder.exists())


def remove_plans(output: Path) -> None:
    """Remove the plans of a data set that is finished."""
    for folder in _plans(output):
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path, make: Make) -> tuple[RawPairs, Plan]:
    try:
        source, plan = make(folder)
        record = {"version": PLAN_VERSION, "source": asdict(source), "plan": {**asdict(plan), "folder": ""}}
        write_atomic(folder / PLAN_NAME, sealed_json(record))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise BadInput(f"cannot write the plan in {folder}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return source, plan


def _load(folder: Path) -> tuple[RawPairs, Plan] | None:
    """Return the plan in a folder, None when there is none that is whole."""
    try:
        record = parse_sealed(read_bytes(folder / PLAN_NAME), PLAN_VERSION)
        return _source(record["source"]), _plan(folder, record["plan"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _source(record: dict[str, Any]) -> RawPairs:
    expected = tuple(record["expected_splits"])
    return RawPairs(**{**record, "draw": Draw(**record["draw"]), "expected_splits": expected})


def _plan(folder: Path, record: dict[str, Any]) -> Plan:
    shards = [PlannedShard(**{**one, "pieces": [(a, b, c) for a, b, c in one["pieces"]]}) for one in record["shards"]]
    return Plan(**{**record, "folder": folder, "shards": shards})
