"""Checkpoints: written aside, fsynced, renamed; the newest one that is whole is what a run resumes from.

RUN/checkpoints/samples-000000012800/
    model.safetensors     generator/..., discriminators/..., ema/...   (frozen backbones are not stored)
    optimizer.pt          optimiser states
    state.json            position, best score, sha256 of the two files
RUN/best/
    model.safetensors     the generator that validated best; position and score in its metadata
    config.yaml
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from cmgan_dist.errors import BadInput
from cmgan_dist.schema import sha256_of, write_atomic

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"


@dataclass
class Progress:
    """Where a run stands."""

    position: int = 0
    """Samples seen."""
    best: float | None = None
    """Best validation score so far."""
    best_position: int = 0
    bad_samples: int = 0
    """Samples that were replaced so far, on all processes."""
    epoch_samples: int = 0
    """Samples in an epoch: a run goes on with the data that it began with."""


@dataclass
class Checkpoint:
    progress: Progress
    tensors: dict[str, Tensor]
    optimizers: dict[str, Any]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write RUN/checkpoints/samples-N and drop all but the newest `keep`. Raises OSError when the disk is full; the
    earlier checkpoints stay."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"samples-{checkpoint.progress.position:012d}"
    aside = folder / f".{final.name}.tmp"
    aside.mkdir()
    packed = io.BytesIO()
    torch.save(checkpoint.optimizers, packed)
    write_atomic(aside / MODEL, save(_contiguous(checkpoint.tensors)))
    write_atomic(aside / OPTIMIZER, packed.getvalue())
    state = asdict(checkpoint.progress) | {"sha256": {n: sha256_of(aside / n) for n in (MODEL, OPTIMIZER)}}
    write_atomic(aside / STATE, json.dumps(state, indent=1) + "\n")
    _sync_folder(aside)
    if final.exists():  # left by a run that was resumed from an older one
        shutil.rmtree(final)
    os.rename(aside, final)
    _sync_folder(folder)
    for old in sorted(folder.glob("samples-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def _read_checkpoint(folder: Path) -> Checkpoint:
    """Raises ValueError or OSError when a file is missing or damaged."""
    state = json.loads((folder / STATE).read_text())
    for name, expected in state.pop("sha256").items():
        if sha256_of(folder / name) != expected:
            raise ValueError(f"{name} is damaged")
    return Checkpoint(
        Progress(**state),
        load((folder / MODEL).read_bytes()),
        torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True),
    )


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. A damaged one is named in the log and passed over."""
    for folder in sorted((run / "checkpoints").glob("samples-*"), reverse=True):
        try:
            return _read_checkpoint(folder)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be used (%s): going back to the one before", folder, error)
    return None


def save_best(run: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Replace RUN/best/model.safetensors in one step."""
    metadata = {k: str(v) for k, v in asdict(progress).items()}
    write_atomic(run / "best" / MODEL, save(_contiguous(tensors), metadata=metadata))


def load_best(run: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(generator tensors, metadata) of RUN/best. Raises BadInput when there is none or it is damaged."""
    path = run / "best" / MODEL
    if not path.is_file():
        raise BadInput(f"{run} has no best/{MODEL}: train it first, or name another run")
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read ({error}): restore it or train again") from None


def check_shapes(expected: dict[str, Tensor], found: dict[str, Tensor], where: str) -> None:
    """Raises BadInput, naming the first difference, when `found` is the checkpoint of another model."""
    for name, tensor in expected.items():
        if name not in found:
            raise BadInput(f"{where} is the checkpoint of another model: it has no {name}; use the config it came with")
        if found[name].shape != tensor.shape:
            raise BadInput(
                f"{where} is the checkpoint of another model: {name} is {list(found[name].shape)}, "
                f"expected {list(tensor.shape)}; use the config it came with"
            )
    for name in found:
        if name not in expected:
            raise BadInput(f"{where} is the checkpoint of another model: it has {name}; use the config it came with")
