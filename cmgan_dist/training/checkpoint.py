"""How the state of a run gets to disk and back: all processes write it aside, it is fsynced and renamed; a run goes on
from the newest checkpoint that is whole.

RUN/checkpoints/samples-000000012800/     torch.distributed.checkpoint; every process writes its share of the tensors
    __R_0.distcp          generator/..., d_image/..., ema/..., optimizer/... of process R (no frozen backbones)
    .metadata             which tensor lies where
    state.json            position, best score, sha256 of the files
RUN/best/
    ...                   the generator that validated best (models/saved.py)

Tensors are stored whole and by name, so a checkpoint knows nothing of the number of processes, DDP or ZeRO.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json, sha256_of, write_atomic

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: meant so

STATE = "state.json"
"""The file of a checkpoint that holds its progress and the sums of its files."""


@dataclass
class Progress:
    """Where a run stands; every checkpoint holds it."""

    position: int = 0
    """Samples that were trained on so far, on all processes."""
    best: float | None = None
    """The best validation score so far."""
    best_position: int = 0
    """The position at which the best score was reached."""
    bad_samples: int = 0
    """Samples that were replaced so far, on all processes."""
    epoch_samples: int = 0
    """Samples in an epoch, by which a run tells whether it goes on with the data that it began with."""


# ---------------------------------------------------------------------------------------------- writing


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_of(tensors: Mapping[str, Tensor], rank: int, world: int) -> list[str]:
    """Return the names of the tensors that process `rank` of `world` writes.

    The largest tensors come first, each to the process that has the fewest bytes by then."""
    load = [0] * world
    mine = []
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        least = load.index(min(load))
        load[least] += tensors[name].nbytes
        if least == rank:
            mine.append(name)
    return mine


class Checkpointer:
    """Writes checkpoints in a thread while training goes on."""

    def __init__(
        self, run: Path, keep: int, *, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        """Prepare to write to RUN/checkpoints; nothing is written yet.

        `keep`: how many of the newest checkpoints stay. `group`: a process group of all processes for CPU tensors that
        nothing else uses: collectives of the thread must not meet those of training."""
        self.folder = run / "checkpoints"
        self.keep, self.rank, self.world, self.group = keep, rank, world, group
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def path(self, position: int) -> Path:
        """Return the folder of the checkpoint at `position` samples."""
        return self.folder / f"samples-{position:012d}"

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write RUN/checkpoints/samples-N; every process calls it with the same tensors.

        The tensors may change as soon as it returns. It waits for the save before it, and raises BadInput when that one
        failed."""
        self.wait()
        mine = {name: tensors[name].detach().cpu().clone() for name in share_of(tensors, self.rank, self.world)}
        self._thread = threading.Thread(target=self._write, args=(replace(progress), mine), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises BadInput, on every process, when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise BadInput(
                f"a checkpoint could not be written to {self.folder} ({error}): free space there and start again; "
                "the earlier checkpoints are whole"
            )

    def _agree(self, error: str | None, hashes: dict[str, str]) -> tuple[str | None, dict[str, str]]:
        """Return the first error of any process, and the hashes of all, on every process the same."""
        if self.world == 1:
            return error, hashes
        every: list[tuple[str | None, dict[str, str]]] = [(None, {})] * self.world
        dist.all_gather_object(every, (error, hashes), group=self.group)
        joined = {k: v for _, part in every for k, v in part.items()}
        return next((e for e, _ in every if e is not None), None), joined

    def _write(self, progress: Progress, mine: dict[str, Tensor]) -> None:
        final = self.path(progress.position)
        aside = self.folder / f".{final.name}.tmp"
        try:
            self._error = self._write_aside(aside, mine, progress)
            if self._error is None and self.rank == 0:
                _sync_folder(aside)
                if final.exists():  # left by a run that was resumed from an older one
                    shutil.rmtree(final)
                os.rename(aside, final)
                _sync_folder(self.folder)
                for old in sorted(self.folder.glob("samples-*"))[: -self.keep]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError) as error:  # the disk, or a process that is gone
            self._error = str(error)
        if self._error is not None and self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)

    def _write_aside(self, aside: Path, mine: dict[str, Tensor], progress: Progress) -> str | None:
        """Write a checkpoint to `aside`; return why it could not be written, the same on every process, or None."""
        error, hashes = None, dict[str, str]()
        try:
            if self.rank == 0:
                for leftover in self.folder.glob(".*.tmp"):
                    shutil.rmtree(leftover)
                aside.mkdir(parents=True)
        except OSError as failed:
            error = str(failed)
        error, _ = self._agree(error, {})
        if error is not None:
            return error
        try:
            writer = dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True)
            dcp.save(mine, storage_writer=writer, process_group=self.group, no_dist=self.world == 1)
            written = sorted(aside.glob(f"__{self.rank}_*.distcp"))
            hashes = {path.name: sha256_of(path) for path in written}
            if self.rank == 0:
                hashes[".metadata"] = sha256_of(aside / ".metadata")
        except CheckpointException as failed:
            error = "; ".join(dict.fromkeys(str(cause[0]) for cause in failed.failures.values()))
        except OSError as failed:
            error = str(failed)
        error, hashes = self._agree(error, hashes)
        if error is None and self.rank == 0:
            write_atomic(aside / STATE, json.dumps(asdict(progress) | {"sha256": hashes}, indent=1) + "\n")
        return error


# ---------------------------------------------------------------------------------------------- reading


def _check_whole(folder: Path) -> None:
    """Raise ValueError, KeyError, TypeError or OSError when a file of the checkpoint is missing or damaged."""
    state = parse_json((folder / STATE).read_bytes())
    hashes = state.pop("sha256")
    Progress(**state)
    for name, expected in hashes.items():
        if sha256_of(folder / name) != expected:
            raise ValueError(f"{name} is damaged")
    if ".metadata" not in hashes:
        raise ValueError("it lists no .metadata")


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None. A damaged one is named in the log and passed over."""
    for folder in sorted((run / "checkpoints").glob("samples-*"), reverse=True):
        try:
            _check_whole(folder)
            return folder
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            log.warning("checkpoint %s cannot be used (%s): going back to the one before", folder, error)
    return None


def read_checkpoint(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Return progress and all tensors of a checkpoint that `latest` has found.

    Raises BadInput when it cannot be read, as where nodes do not share the storage."""
    try:
        state = parse_json((folder / STATE).read_bytes())
        del state["sha256"]
        reader = dcp.FileSystemReader(folder)
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, CheckpointException) as error:
        raise BadInput(
            f"checkpoint {folder} cannot be read here ({error}): --output must lie on storage that all nodes share"
        ) from None
    return Progress(**state), tensors
