"""Weights of backbones: where they lie, their checksum, and the layouts of other libraries."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cmgan_dist.errors import BadInput
from cmgan_dist.files import check_regular, sha256_of


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers by name, dtype and shape, whatever file they came from.

    Buffers that are not persistent do not count."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def in_package(weights: str, suffixes: tuple[str, ...], field: str) -> Path:
    """Return the only file with one of the names or suffixes that the package in ``package:NAME`` carries.

    Raises BadInput. The package's own code is not run."""
    name = weights.removeprefix("package:")
    try:
        spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    except ValueError:  # of a module that was made while the program ran
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"{field}: there is no package '{name}': install it with pip, or name other weights")
    folders = [Path(location) for location in spec.submodule_search_locations]
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.name.endswith(suffixes)]
    if len(found) != 1:
        raise BadInput(
            f"{field}: package '{name}' carries {len(found)} files named {' or '.join(suffixes)}, expected one: "
            "give the path of the file that you mean"
        )
    return found[0]


MOST_LINE = 240
"""Characters of a library's error that a sentence repeats."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty, and those that it is the heading of, cut where it
    is long; without one the name of the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    headings = len(list(itertools.takewhile(lambda line: line.endswith(":"), lines)))
    line = " ".join(lines[: headings + 1])
    return line if len(line) <= MOST_LINE else f"{line[:MOST_LINE]} ..."


def read_weights(weights: str) -> dict[str, Tensor]:
    """Return the state of a model from a .pth or .safetensors file. Raises BadInput; code in the file is not run."""
    from timm.models import load_state_dict

    if weights.startswith("package:"):
        path = in_package(weights, (".pth", ".pt", ".safetensors"), "model.image.weights")
    else:
        path = Path(weights)
    if not path.is_file():
        raise BadInput(
            f"model.image.weights: file {path} {'is no file' if path.exists() else 'does not exist'}: "
            "give a .pth or .safetensors file, 'hub' or 'package:NAME'"
        )
    try:
        check_regular(path)  # safetensors calls all that it may not read missing
    except OSError as error:
        raise BadInput(f"model.image.weights: {path} cannot be read ({error.strerror}): make it readable") from None
    try:
        _check_sums(path)
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than tensors")
    except UNREADABLE as error:
        raise BadInput(
            f"model.image.weights: {path} is not a file of weights ({first_line(error)}): get it again"
        ) from None
    return state


def _check_sums(path: Path) -> None:
    """Compare what torch.save has written with the file's own sums (CRC-32), which torch does not look at.

    Raises ValueError where they differ, and what zipfile raises."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} in it is another")


UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    AssertionError,
    AttributeError,
    OverflowError,
    TypeError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)
"""What libraries raise at a file of weights that they cannot read."""


def load_strictly(model: nn.Module, state: dict[str, Tensor], weights: str) -> None:
    """Load a state in which every key has its place and every place its key; a classifier's keys are left out.

    Raises BadInput naming the first keys that do not fit."""
    try:
        state = _with_own_names(model, state)
    except (ValueError, LookupError, RuntimeError) as error:
        raise _misfit(weights, [first_line(error)]) from None
    heads = model.default_cfg["classifier"]  # type: ignore[index]
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} has no place" for key in state if key not in own]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong += [f"{key} holds {state[key].dtype}, {state[key].layout}" for key in own if not _same_kind(own, state, key)]
    if wrong:
        raise _misfit(weights, wrong)
    model.load_state_dict(state)


def _same_kind(own: dict[str, Tensor], state: dict[str, Tensor], key: str) -> bool:
    """Return whether a value, where there is one, is dense and holds floats where the model's own does: what is
    quantised or complex is another number when it is copied."""
    if key not in state:
        return True
    dense = state[key].layout == own[key].layout
    return dense and (state[key].is_floating_point() or not own[key].is_floating_point())


def _misfit(weights: str, wrong: list[str]) -> BadInput:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return BadInput(
        f"model.image.weights: '{weights}' does not fit the model ({'; '.join(wrong[:3])}{more}): "
        "name the model that these weights are of"
    )


def _with_own_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the names of timm's models, also of EfficientNet-PyTorch's or torchvision's.

    Raises ValueError, LookupError or RuntimeError where it only looks like one of these."""
    if is_lite(state):
        return _from_lite(model, state)
    if "classifier.6.weight" in state and hasattr(model, "pre_logits"):
        return _from_torchvision_vgg(state)
    return state


LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""EfficientNet-lite is trained on (pixel - 127) / 128 (tensorflow/tpu, efficientnet/lite)."""
_LITE_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_LITE_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
"""Module names of EfficientNet-PyTorch -> timm's, in a block without and with expansion, and outside of blocks."""


def is_lite(state: dict[str, Tensor]) -> bool:
    """Tell the lite variant of EfficientNet-PyTorch by its keys: it has no squeeze-and-excitation."""
    return "_conv_stem.weight" in state and not any("._se_" in key for key in state)


def _from_lite(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-lite weights with the keys of EfficientNet-PyTorch, whose blocks are numbered through, as timm's."""
    stages: Any = getattr(model, "blocks", [])
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    expanding = {key.split(".")[1] for key in state if "._expand_conv." in key}
    mapped = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks" and int(parts[1]) < len(places):
            names = _LITE_EXPANDING if parts[1] in expanding else _LITE_PLAIN
            key = ".".join([places[int(parts[1])], names.get(parts[2], parts[2]), *parts[3:]])
        else:
            key = ".".join([_LITE_OUTER.get(parts[0], parts[0]), *parts[1:]])
        mapped[key] = value
    return mapped


def _from_torchvision_vgg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """VGG weights of torchvision as timm's, in which fc6 and fc7 are convolutions."""
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    sides = {"classifier.0.weight": 7, "classifier.3.weight": 1}
    mapped = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if key in sides:
            value = value.view(len(value), -1, sides[key], sides[key])
        mapped[f"{names.get(module, module)}.{leaf}"] = value
    return mapped


def checksums_of(path: Path) -> dict[str, str]:
    """ "" or "/NAME" -> SHA-256 of a file, or of each file below a folder; {} where there is nothing."""
    if path.is_dir():
        return {f"/{p.relative_to(path).as_posix()}": sha256_of(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return {"": sha256_of(path)} if path.exists() else {}


def check_folder(folder: Path) -> None:
    """Raise OSError where something in a folder that a library will read is neither a file nor a folder."""
    for path in sorted(folder.rglob("*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            check_regular(path)


def copy_weights(source: Path, target: Path) -> None:
    """Put a copy of a file or folder in the place of `target`; what a killed copy left is written over.

    Raises OSError."""
    aside = target.with_name(f".{target.name}.tmp")
    for leftover in (aside, target):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    aside.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, aside)
    os.replace(aside, target)
