"""How a batch comes from the worker that decodes it to the process that trains.

It goes through shared memory where that has room. Where it has not, as under Docker, whose /dev/shm has 64 MiB, torch
would drop the batch in a thread of the worker and be waited for without end: so a worker packs its batches itself, and
those that do not fit go through the pipe."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.data.batch import Batch
from cmgan_dist.errors import BadInput

log = logging.getLogger(__name__)
LOOK_S = 5
"""Seconds between two looks for workers that are gone."""
T = TypeVar("T")
_said = False


@dataclass
class Packed:
    """A batch on its way."""

    payload: bytes
    shared: bool
    """Whether its tensors lie in shared memory; else they are in the payload."""

    def unpack(self) -> Batch:
        """Return the batch. Raises BadInput when the worker that has it is gone."""
        try:
            batch: Batch = pickle.loads(self.payload)
        except (OSError, EOFError) as error:
            raise lost_worker(error) from None
        if not self.shared:
            _say_pipe()
            batch = _changed(batch, np.ndarray, torch.from_numpy)
        return batch

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory. A DataLoader calls it by this name."""
        return self.unpack().pin_memory()


def pack(batch: Batch) -> Packed:
    """Return a batch as another process can take it, through shared memory where there is room."""
    try:
        return Packed(bytes(ForkingPickler.dumps(batch)), True)
    except (RuntimeError, OSError):  # what torch says of a full /dev/shm, or of no descriptors left
        return Packed(pickle.dumps(_changed(batch, Tensor, lambda x: x.numpy())), False)


def _changed(batch: Batch, kind: type, change: Any) -> Batch:
    """Return a batch with another form of its values of one kind."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{k: change(v) for k, v in values.items() if isinstance(v, kind)})


def _say_pipe() -> None:
    global _said
    if not _said:
        _said = True
        log.warning(
            "/dev/shm has no room for batches: they come through pipes, which is slower; enlarge it (docker run "
            "--shm-size), lower stream.workers or set it to 0"
        )


def next_item(loader: Iterator[T], patience_s: float) -> T:
    """Return the next item of a DataLoader whose timeout is LOOK_S; only at its end torch looks for killed workers.

    Raises RuntimeError, as `is_lost_worker` knows it, when a worker ended or gave nothing for `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return next(loader)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() > deadline:
                raise


def lost_worker(error: BaseException) -> BadInput:
    """Return the sentence for a worker that was killed or gives nothing any more."""
    return BadInput(
        f"a process that decodes samples is gone ({' '.join(str(error).split())[:160]}): where memory ran out, lower "
        "stream.workers; then start again to go on from the last checkpoint"
    )


def is_lost_worker(error: BaseException) -> bool:
    """Return whether `error` is torch's for a DataLoader's worker that ended, or gave nothing in time.

    It comes by a signal's handler, wherever the process is."""
    return isinstance(error, RuntimeError) and "DataLoader" in str(error)
