"""What may have happened to a file that a program reads."""

from __future__ import annotations

import contextlib
import multiprocessing.synchronize  # noqa: F401 - `as_nobody` may not read it where Python is root's
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Damage = Callable[[Path], None]


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def no_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00" + path.read_bytes()[3:])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def older(path: Path) -> None:
    path.write_bytes(re.sub(rb'"version": \d+', b'"version": 0', path.read_bytes()))


def other_types(path: Path) -> None:
    """JSON, and nothing in it is of its kind."""
    path.write_text('{"metrics": [1], "classes": 3, "ends": "x", "baselines": [], "frontiers": 7, "version": 1}')


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Nobody writes into it: who opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def forbidden(path: Path) -> None:
    path.chmod(0)


class Planted:
    """A pickle that makes a folder where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


TRACE = "a-pickle-was-read"
"""What `pickled` leaves beside a file when its pickle is read."""


def pickled(path: Path) -> None:
    """Code in its place; in arrays as numpy keeps objects, in weights as torch does."""
    planted = Planted(path.with_name(TRACE))
    if path.suffix == ".npy":
        np.save(path, np.array([planted], dtype=object), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, keys=np.array([planted], dtype=object))
    elif path.suffix in (".pth", ".pt", ".bin"):
        torch.save({"weight": planted}, path)
    else:
        path.write_bytes(pickle.dumps(planted))


DAMAGES: list[Damage] = [
    missing,
    empty,
    cut,
    no_utf8,
    flipped,
    older,
    other_types,
    folder,
    pipe,
    circle,
    forbidden,
    pickled,
]


@contextlib.contextmanager
def as_nobody(place: Path) -> Iterator[None]:
    """Root may read everything: be somebody else, to whom the folders belong."""
    if os.geteuid():
        yield
        return
    for path in [place, *place.rglob("*")]:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    opened = [parent for parent in place.parents if parent.stat().st_mode & 0o077 == 0]
    for parent in opened:
        parent.chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent in opened:
            parent.chmod(0o700)


@contextlib.contextmanager
def not_waited_for(path: Path, seconds: int = 60) -> Iterator[None]:
    """Fail where it takes longer: a pipe at `path`, which nobody writes into, was waited for."""

    def late(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):  # whoever waits for it, in other threads too, goes on
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        pytest.fail(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(
    whole: Path, place: Path, name: str, damage: Damage, read: Callable[[Path], tuple[int, str]]
) -> tuple[int, str]:
    """Damage the last file `name` of a copy of `whole` at `place`, and read it: what `toy.call` returns.

    It must be done without, or refused in one sentence, and nothing may be run or left half written."""
    shutil.copytree(whole, place)
    paths = sorted(place.glob(name))
    assert paths
    damage(paths[-1])
    with as_nobody(place) if damage is forbidden else contextlib.nullcontext(), not_waited_for(paths[-1]):
        code, error = read(place)
    print(code, error)
    assert not list(place.rglob(TRACE))
    assert code in (0, 2)
    assert error.count("error: ") == (code == 2), error
    assert len(error) < 700
    if damage is forbidden and code == 2:
        assert "Permission denied" in error
    assert not [path for path in place.rglob("*.tmp") if "earlier" not in str(path)]
    return code, error
