"""How the state of a run gets to disk and back: all processes write it aside, it is fsynced and renamed; a run goes on
from the newest checkpoint that is whole.

RUN/checkpoints/samples-000000012800/     other names in RUN/checkpoints are no checkpoints
    rank-00000.safetensors    generator/..., d_image/..., ema/..., optimizer/...: what process 0 wrote of them (no
                              frozen backbones)
    state.json                position, best score, SHA-256 of the other files and of itself
RUN/best/
    ...                       the generator that validated best (models/saved.py)

Tensors are stored whole and by name, so a checkpoint knows nothing of the number of processes, DDP, sharding or
ZeRO. No file of it is a pickle: reading one runs no code.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmgan_dist.data.folder import check_link
from cmgan_dist.distributed.shard import whole_tensors
from cmgan_dist.errors import BadInput
from cmgan_dist.files import OtherVersion, parse_sealed, read_bytes, sealed_json, sha256_of, write_atomic

log = logging.getLogger(__name__)

STATE = "state.json"
"""The file of a checkpoint that holds its progress and the sums of its files."""
VERSION = 1
_NAME = re.compile(r"samples-([0-9]+)")


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
    skipped: dict[str, int] = field(default_factory=dict)
    """skipped/PHASE in fp16: steps left out so far. Not changed in place, since a save may be under way."""
    epoch_samples: int = 0
    """Samples in an epoch."""
    data: str = ""
    """The training split that the run began with, by `origin.fingerprint_of`."""
    validation: str = ""
    """The validation split likewise: `best` is a score of no other; "" where it is not known."""
    classes: list[str] | None = None
    """The names of the classes in label order; None where they are not known."""
    label_kind: str = ""
    """single, multi or none (LabelKind); "" where it is not known."""


def position_of(folder: Path) -> int | None:
    """Return the position that a folder's name says, None where it is no name of a checkpoint."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


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
        self.newest: int | None = None
        """The position of the last checkpoint that was written here, or that the run goes on from."""
        self._thread: threading.Thread | None = None
        self._error: str | RuntimeError | None = None

    def path(self, position: int) -> Path:
        """Return the folder of the checkpoint at `position` samples."""
        return self.folder / f"samples-{position:012d}"

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write RUN/checkpoints/samples-N; every process calls it with the same tensors.

        The tensors may change as soon as it returns. It waits for the save before it, and raises BadInput when that one
        failed."""
        self.wait()
        names = share_of(tensors, self.rank, self.world)
        found = whole_tensors(tensors, set(names))
        mine = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found}
        self._thread = threading.Thread(target=self._write, args=(replace(progress), mine), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises BadInput, on every process, when it could not be written, and the
        collective's error where another process was lost meanwhile."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, RuntimeError):
                raise error
            raise BadInput(
                f"a checkpoint could not be written to {self.folder} ({error}): free space there, or make it writable, "
                "and start again; the earlier checkpoints are whole"
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
                self._give_name(aside, final)
        except OSError as error:
            self._error = str(error)
        except RuntimeError as error:  # of a process that is gone
            self._error = error
        if self._error is None:
            self.newest = progress.position
        elif self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)

    def _give_name(self, aside: Path, final: Path) -> None:
        """Make what was written `aside` the checkpoint `final`, and remove those that are too many before it.

        What lies behind it, such as one that could not be used, stays until the run comes there."""
        _sync_folder(aside)
        if os.path.lexists(final):  # it could not be used, or the run was resumed from an older one
            _remove(final)
        os.rename(aside, final)
        _sync_folder(self.folder)
        before = [path for path in checkpoints_of(self.folder) if (position_of(path) or 0) <= (position_of(final) or 0)]
        for old in before[: -self.keep]:
            _remove(old)

    def _write_aside(self, aside: Path, mine: dict[str, Tensor], progress: Progress) -> str | None:
        """Write a checkpoint to `aside`; return why it could not be written, the same on every process, or None."""
        error, hashes = None, dict[str, str]()
        try:
            if self.rank == 0:
                for leftover in self.folder.glob(".*.tmp"):
                    _remove(leftover)
                aside.mkdir(parents=True)
        except OSError as failed:
            error = str(failed)
        error, _ = self._agree(error, {})
        if error is not None:
            return error
        try:
            hashes = _write_share(aside / f"rank-{self.rank:05d}.safetensors", mine)
        except (OSError, SafetensorError) as failed:
            error = str(failed)
        error, hashes = self._agree(error, hashes)
        if error is None and self.rank == 0:
            write_atomic(aside / STATE, sealed_json({"version": VERSION, **asdict(progress), "files": hashes}))
        return error


def _write_share(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one process's tensors to disk and return {name of the file: its SHA-256}."""
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {path.name: sha256_of(path)}


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link in its place. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---------------------------------------------------------------------------------------------- reading


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, by position; none where the folder is not there yet.

    Raises BadInput when the folder cannot be read: that is not the same."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        check_link(folder)
        return []
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror}): make it a readable folder") from None
    found = [(position_of(path), path) for path in map(folder.joinpath, names)]
    return [path for position, path in sorted((p, path) for p, path in found if p is not None)]


def _read_state(folder: Path) -> tuple[Progress, dict[str, str]]:
    """Return a checkpoint's progress and the checksums of its files.

    Raises OSError when it cannot be read, ValueError or TypeError when it is damaged."""
    state = parse_sealed(read_bytes(folder / STATE), VERSION)
    files = state.pop("files")
    progress = Progress(**state)
    if progress.position != position_of(folder):
        raise ValueError(f"it is of sample {progress.position}")
    return progress, files


def _why_unusable(folder: Path) -> str | None:
    """Return what is damaged or missing in a checkpoint, None when it is whole.

    Raises BadInput when it may be whole and cannot be read: an older one must not take its place unasked."""
    try:
        for name, expected in _read_state(folder)[1].items():
            if sha256_of(folder / name) != expected:
                return f"{name} is damaged"
    except OtherVersion as error:
        if isinstance(error.version, int):
            raise BadInput(
                f"checkpoint {folder} has version {error.version}, this program reads {VERSION}: go on with the "
                "program that wrote it, or move it away to go back to the one before"
            ) from None
        return f"{STATE} is damaged, or of an earlier version"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        raise BadInput(
            f"checkpoint {folder} cannot be read ({error.strerror}): make it readable, or move it away to go back to "
            "the one before"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} is damaged: {error}"
    return None


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None where there is none at all.

    A damaged one is named in the log and passed over. Raises BadInput where checkpoints are there and none can be used,
    or one cannot be read: a run that began anew would write over them."""
    found = checkpoints_of(run / "checkpoints")
    reasons = []
    for folder in reversed(found):
        why = _why_unusable(folder)
        if why is None:
            return folder
        log.warning("checkpoint %s cannot be used (%s): going back to the one before", folder, why)
        reasons.append(f"{folder.name}: {why}")
    if not found:
        return None
    raise BadInput(
        f"none of the {len(found)} checkpoints in {run / 'checkpoints'} can be used ({reasons[0]}): restore one, or "
        "begin anew by --resume never, which moves this run aside"
    )


def read_checkpoint(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Return progress and all tensors of a checkpoint that `latest` has found.

    Raises BadInput when it cannot be read, as where nodes do not share the storage."""
    tensors: dict[str, Tensor] = {}
    try:
        progress, files = _read_state(folder)
        for name in files:
            tensors |= load_file(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(
            f"checkpoint {folder} cannot be read here ({error}): --output must lie on storage that all nodes share"
        ) from None
    return progress, tensors
