"""Where a plan lies while it is needed: on disk in the output, beside the shards.

A plan that takes long is made once for all tasks and all starts, in ``.plan-STAMP``: the stamp is a hash of what the
plan is made from, so tables that changed have another. Whoever comes second waits until it is made. What makes a
shard of it reads the plan, so it stays until the data set is finished."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_sealed, sealed_json, write_atomic
from cmgan_dist.jobs.lock import owning_in_turn
from shards.pairs import Draw, RawPairs
from shards.plan import Plan, PlannedShard

PLAN_VERSION = 1
PLAN_NAME = "plan.json"
"""Written last into the folder of a plan."""
LOCK = "plan"
Make = Callable[[Path], tuple[RawPairs, Plan]]
"""Makes a plan in a folder."""


@contextlib.contextmanager
def planned(output: Path, stamp: str, make: Make) -> Iterator[tuple[RawPairs, Plan]]:
    """Give what a source says and the plan: the one of this stamp that is there, or one that is made.

    Without a `stamp` the plan is this process's own, and removed at the end. Raises what `make` does."""
    if stamp:
        with owning_in_turn(output, LOCK):
            folder = output.absolute() / f".plan-{stamp[:16]}"
            found = _load(folder) or _make(folder, make)
        yield found
        return
    name = f".{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"  # see jobs/staging.py
    folder = output.absolute() / name
    try:
        yield make(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_plans(output: Path) -> None:
    """Remove the plans of a data set that is finished."""
    for folder in output.glob(".plan-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path, make: Make) -> tuple[RawPairs, Plan]:
    shutil.rmtree(folder, ignore_errors=True)  # left by a start that was killed
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
        record = parse_sealed((folder / PLAN_NAME).read_bytes(), PLAN_VERSION)
        return _source(record["source"]), _plan(folder, record["plan"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _source(record: dict[str, Any]) -> RawPairs:
    expected = tuple(record["expected_splits"])
    return RawPairs(**{**record, "draw": Draw(**record["draw"]), "expected_splits": expected})


def _plan(folder: Path, record: dict[str, Any]) -> Plan:
    shards = [PlannedShard(**{**one, "pieces": [(a, b, c) for a, b, c in one["pieces"]]}) for one in record["shards"]]
    return Plan(**{**record, "folder": folder, "shards": shards})
