"""A trained model as files that run without this package: ONNX, or a program of torch.export.

The way of an export: fold BatchNorm into the linear layers -> trace -> write aside -> read back -> compare with the
model itself on random input -> give the files their names.

Shapes: n rows, F features of a backbone, E dimensions of the common space, D of a vector, S the side of a picture in
pixels, L tokens.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.data.folder import checked_path
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.staging import staging
from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.models.backbones import SentenceCNN, SentenceEncoder
from cmgan_dist.models.generator import Generator, Modality
from cmgan_dist.models.saved import MODEL_NAME, Saved, load_backbone
from cmgan_dist.models.scoring import class_logits
from cmgan_dist.models.weights import first_line

TOLERANCE = 1e-5
"""The largest difference of any number of a vector between a file and the model that it was made from."""
CHECKED_ROWS = (1, 7)
"""Rows of the batches on which a file is compared with the model; it is traced with TRACED_ROWS."""
TRACED_ROWS = 2
MODALITIES: tuple[Modality, Modality] = ("image", "text")

Inputs = tuple[Tensor, ...]
"""What an exported file takes, in order."""


# ---------------------------------------------------------------------------------------------- what is exported


def _scale_and_shift(norm: GroupBatchNorm, group: int) -> tuple[Tensor, Tensor]:
    """Return float64 (scale [C], shift [C]): in eval mode BatchNorm is x * scale + shift."""
    mean, variance = (norm.get_buffer(f"running_{name}")[group].double() for name in ("mean", "var"))
    scale = 1 / (variance + norm.eps).sqrt() * (1.0 if norm.weight is None else norm.weight.double())
    return scale, (0.0 if norm.bias is None else norm.bias.double()) - mean * scale


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made


class FoldedProjection(nn.Module):
    """One modality's way from features to the common space, with every BatchNorm folded into the layer beside it.

    Two linear layers are left. The differences to the generator are those of float32 rounding."""

    @torch.no_grad()
    def __init__(self, generator: Generator, modality: Modality) -> None:
        """Fold a generator on the CPU, in eval mode."""
        super().__init__()
        encoder = generator.image_encoder if modality == "image" else generator.text_encoder
        weight = encoder.linear.weight.double()
        bias = torch.zeros(len(weight), dtype=torch.float64)
        self.unit_input = encoder.input_norm.kind == "l2"
        if encoder.input_norm.norm is not None:
            scale, shift = _scale_and_shift(encoder.input_norm.norm, 0)
            weight, bias = weight * scale, weight @ shift
        scale, shift = _scale_and_shift(encoder.norm, 0)
        self.hidden, self.hidden_slope = _linear(weight * scale[:, None], bias * scale + shift), encoder.norm.slope
        number = MODALITIES.index(modality)
        copy_, group = (0, number) if generator.shared.shared else (number, 0)
        linear, norm = generator.shared.linear[copy_], generator.shared.norm[copy_]
        assert isinstance(linear, nn.Linear)
        assert isinstance(norm, GroupBatchNorm)
        scale, shift = _scale_and_shift(norm, group)
        self.common, self.common_slope = _linear(linear.weight.double() * scale[:, None], shift), norm.slope
        self.requires_grad_(False).eval()

    def forward(self, features: Tensor) -> Tensor:
        """Features float32 [n, F] -> common representations [n, E]."""
        x = F.normalize(features, dim=1) if self.unit_input else features
        x = F.leaky_relu(self.hidden(x), self.hidden_slope)
        x = self.common(x)
        return F.leaky_relu(x, self.common_slope) if self.common_slope != 1 else x


class _Vectors(nn.Module):
    """Features -> vectors, by a projection, the modality's classifier and the model's scoring."""

    def __init__(self, saved: Saved, generator: Generator, modality: Modality, projection: nn.Module) -> None:
        super().__init__()
        self.projection, self.modality = projection, modality
        self.generator, self.scoring = generator, copy.deepcopy(saved.scoring).cpu()

    def forward(self, features: Tensor) -> Tensor:
        features = features.float()
        common = self.projection(features)
        out: Tensor = self.scoring(self.modality, features, common, class_logits(self.generator, self.modality, common))
        return out


class _FromPixels(nn.Module):
    """An image backbone, which normalises by itself, and a projection."""

    def __init__(self, backbone: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.projection(self.backbone(pixels))
        return out


class _FromTokens(nn.Module):
    """A text backbone and a projection. A sentence encoder takes a mask, the text CNN knows its padding."""

    def __init__(self, backbone: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            tokens = {"ids": input_ids}
        else:
            tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        out: Tensor = self.projection(self.backbone(tokens))
        return out


class _Eager(nn.Module):
    """The generator's own projection, with its BatchNorm: what the folded one is compared with."""

    def __init__(self, generator: Generator, modality: Modality) -> None:
        super().__init__()
        self.generator, self.modality = generator, modality

    def forward(self, features: Tensor) -> Tensor:
        project = self.generator.project_images if self.modality == "image" else self.generator.project_texts
        return project(features)


@dataclass
class _Part:
    """One modality of a model, ready to be traced."""

    modality: Modality
    traced: nn.Module
    """Inputs -> vectors [n, D]."""
    eager: nn.Module
    """The same by the model as it is."""
    inputs: dict[str, dict[int, Any]]
    """Names of the inputs, each with its dimensions that may have any size."""
    example: Callable[[int], Inputs]
    """Number of rows -> random inputs."""
    facts: dict[str, str]
    """What a user of the file needs to know; it goes into the file's metadata."""

    @property
    def output(self) -> str:
        """Name of the output, as CLIP exports have it."""
        return f"{self.modality}_embeds"

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        return tuple(self.inputs.values())


def _part_of(saved: Saved, generator: Generator, modality: Modality, backbone: bool) -> _Part:
    """Return a modality from features, or from raw input with its backbone. Raises BadInput when that is not known."""
    spec, generator = getattr(saved.spec, modality), copy.deepcopy(generator).cpu().requires_grad_(False)
    random, rows = torch.Generator().manual_seed(0), torch.export.Dim("rows", min=1, max=1 << 20)
    traced, eager = (
        _Vectors(saved, generator, modality, projection)
        for projection in (FoldedProjection(generator, modality), _Eager(generator, modality))
    )
    facts = {
        "model_sha256": saved.spec.files[MODEL_NAME],
        "modality": modality,
        "backbone": spec.name,
        "classes": json.dumps(saved.spec.data.classes, ensure_ascii=False),
    }
    if not backbone:
        inputs = {f"{modality}_features": {0: rows}}
        return _Part(modality, traced, eager, inputs, lambda n: (torch.randn(n, spec.dim, generator=random),), facts)
    made = load_backbone(saved, modality)
    if modality == "image":
        size = spec.image_size or ImageBackboneConfig.image_size

        def pixels(n: int) -> Inputs:
            return (torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random),)

        facts["image_size"] = str(size)
        raw = (_FromPixels(made, traced).eval(), _FromPixels(made, eager).eval())
        return _Part(modality, *raw, {"pixels": {0: rows}}, pixels, facts)
    if not isinstance(made, SentenceCNN | SentenceEncoder):
        raise BadInput(f"a text tower of {spec.name} is not exported with its tokens: export it from features")
    longest = spec.max_tokens or TextBackboneConfig.max_tokens
    free = {0: rows, 1: torch.export.Dim("tokens", min=1 if isinstance(made, SentenceCNN) else 2, max=longest)}
    facts["max_tokens"] = str(longest)
    if isinstance(made, SentenceCNN):
        facts["vocabulary"] = made.vocabulary.to_json()
    elif (tokeniser := getattr(made.model.tokenizer, "backend_tokenizer", None)) is not None:
        facts["tokenizer"] = tokeniser.to_str()
    names = ["input_ids"] if isinstance(made, SentenceCNN) else ["input_ids", "attention_mask"]
    raw_text = (_FromTokens(made, traced).eval(), _FromTokens(made, eager).eval())
    return _Part(modality, *raw_text, dict.fromkeys(names, free), lambda n: _random_tokens(made, n), facts)


def _random_tokens(backbone: SentenceCNN | SentenceEncoder, rows: int) -> Inputs:
    """Return the tokens of `rows` texts of 2, 3, 4, ... words."""
    words = list(backbone.vocabulary.words) if isinstance(backbone, SentenceCNN) else ["heart", "dog", "boat"]
    made: Any = backbone.tokenise([" ".join(words[i % len(words)] for i in range(n + 1)) for n in range(1, rows + 1)])
    if isinstance(backbone, SentenceCNN):
        return (made["ids"],)
    return made["input_ids"], made["attention_mask"]


# ---------------------------------------------------------------------------------------------- kinds of files


def _write_program(part: _Part, path: Path) -> None:
    program = torch.export.export(part.traced, part.example(TRACED_ROWS), dynamic_shapes=part.dynamic_shapes)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(part.facts)})


def _read_program(path: Path, part: _Part) -> Callable[[Inputs], Tensor]:
    module = torch.export.load(path).module()
    return lambda inputs: module(*inputs)


def _write_onnx(part: _Part, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # two inputs have the same rows, and it names them once
        program = torch.onnx.export(
            part.traced,
            part.example(TRACED_ROWS),
            dynamo=True,
            dynamic_shapes=part.dynamic_shapes,
            input_names=list(part.inputs),
            output_names=[part.output],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(part.facts)
    program.save(path, external_data=False)


def _read_onnx(path: Path, part: _Part) -> Callable[[Inputs], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        named = {name: value.numpy() for name, value in zip(part.inputs, inputs, strict=True)}
        return torch.from_numpy(session.run([part.output], named)[0])

    return run


KINDS = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_program, _read_program)}
"""Ending -> what writes such a file, and what reads it back."""
_FAILED = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError)
"""What tracing raises at code that it cannot follow; the exporters' own errors are RuntimeErrors."""


# ---------------------------------------------------------------------------------------------- the export


def _check_path(path: Path) -> None:
    """Raises BadInput when the ending is not known or packages are missing."""
    if path.suffix not in KINDS:
        raise BadInput(f"{path} ends in '{path.suffix}': name a file that ends in {' or '.join(KINDS)}")
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if path.suffix == ".onnx" and missing:
        raise BadInput(
            f"{path} needs the package {missing[0]}: pip install 'cmgan-dist[export]', or export a .pt2 file"
        )


@torch.no_grad()
def _write_checked(part: _Part, path: Path, named: Path) -> None:
    """Write `path` and compare it with the model. Raises BadInput, which speaks of the file as `named`."""
    write, read = KINDS[path.suffix]
    try:
        write(part, path)
    except _FAILED as error:
        raise BadInput(
            f"{named}: the {part.modality} part cannot be traced ({first_line(error)}): export it from features, "
            "without its backbone"
        ) from error
    run = read(path, part)
    for rows in CHECKED_ROWS:
        inputs = part.example(rows)
        difference = float((run(inputs) - part.eager(*inputs)).abs().max())
        if not difference <= TOLERANCE:
            raise BadInput(
                f"{named}: what was exported differs from the model by {difference:.1e} on {rows} random rows, more "
                f"than {TOLERANCE:.0e}, and was removed: export from features, without the backbone, or another format"
            )


def export_model(
    saved: Saved,
    generator: Generator,
    path: str | Path,
    *,
    modality: Modality | None = None,
    backbone: bool = False,
) -> list[Path]:
    """Write a model as ONNX (``.onnx``) or a torch.export program (``.pt2``) and return the paths of its files.

    `generator` is that of `saved`, in eval mode.

    As CLIP exports are, each modality is a file of its own: ``mine.onnx`` becomes ``mine.image.onnx`` and
    ``mine.text.onnx``; with `modality` that one alone is written, to `path` itself. Any number of rows n goes in:

        image_features float32 [n, F_i]     -> image_embeds float32 [n, D], no longer than 1
        text_features float32 [n, F_t]      -> text_embeds float32 [n, D], no longer than 1

    `backbone`: with the backbones in the files, which then take ``pixels`` uint8 [n, 3, S, S], red, green and blue,
    cut and resized as `decode_image` does and not normalised (the file does it), and ``input_ids`` int64 [n, L] with,
    for a sentence encoder, ``attention_mask`` int64 [n, L], as the encoder's own tokeniser makes them.

    The metadata of a file name the model's SHA-256, its classes and sizes, and hold the tokeniser ("tokenizer", as
    tokenizer.json has it) or the words ("vocabulary") of a text backbone. Each file is read back and compared with the
    model on random input of two batch sizes. Raises BadInput, leaving no new file, when one differs by more than
    1e-5, cannot be traced or written, or a package is missing."""
    path = checked_path(path, "path")
    _check_path(path)
    if modality not in (None, *MODALITIES):
        raise BadInput(f"modality is {modality!r}: it must be image or text")
    targets = {m: path.with_suffix(f".{m}{path.suffix}") for m in MODALITIES} if modality is None else {modality: path}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path.parent) as folder:
            for m, target in targets.items():
                _write_checked(_part_of(saved, generator, m, backbone), folder / target.name, target)
            for target in targets.values():
                os.replace(folder / target.name, target)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written ({error.strerror or error}): free space there or name another"
        ) from None
    return list(targets.values())
