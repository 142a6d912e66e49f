"""RUN/best: the trained generator with all that is needed to go from a raw picture or text to the common space.

    best/model.json            classes, how features are made, config, how training stood, SHA-256 of every other file
    best/model.safetensors     the generator's tensors, trained backbones included, and ``scoring/*`` (`Scoring`)
    best/config.yaml           the whole Config
    best/vocabulary.json       words of the text CNN, where there is one
    best/backbones/image|text  weights of frozen backbones that were given as a file or folder

The folder can be copied anywhere: weights in packages and on a hub are named and checked by their SHA-256.

A save writes each changed file as NAME.new, then replaces model.json, then gives the files their names. Whenever it is
killed, the checksums in model.json tell which of NAME and NAME.new belong to it, so one whole model is always there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmgan_dist.config.fields import CONFIG_NAME, Config, ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.config.load import load_config, to_yaml
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.data.source import public_config
from cmgan_dist.errors import BadInput, Unreadable, refuse_url
from cmgan_dist.files import (
    LATER,
    OtherVersion,
    commit_files,
    parse_sealed,
    read_bytes,
    sealed_json,
    sha256_of,
    write_atomic,
)
from cmgan_dist.models.backbone import ImageBackbone, PixelBackbone, TextBackbone
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone
from cmgan_dist.models.clip import is_open_clip
from cmgan_dist.models.generator import Generator, Modality, build_generator
from cmgan_dist.models.scoring import PREFIX as SCORING
from cmgan_dist.models.scoring import Scoring
from cmgan_dist.models.vocabulary import Vocabulary
from cmgan_dist.models.weights import checksums_of, copy_weights, weights_sha256

BEST = "best"
SPEC_NAME, MODEL_NAME, VOCABULARY_NAME = "model.json", "model.safetensors", "vocabulary.json"
VERSION = 1
CAPTIONS = {"training": "one of a picture's captions is drawn each epoch", "evaluation": "every caption is an item"}


@dataclass
class BackboneSpec:
    """How the features of one modality are made from raw input."""

    name: str
    """A timm model, "sentence", "cnn", "open_clip:MODEL", or "features" where nothing says how they were made."""
    dim: int
    """F, the feature dimension."""
    trained: bool = False
    """Trained with the generator: its tensors are in model.safetensors."""
    weights: str = ""
    """"hub", "hub:NAME", "package:NAME", a path in best/, or the path on the machine of training; "" when trained, but
    for what a tokeniser or an architecture comes from."""
    weights_sha256: str = ""
    """Of the built backbone, by `weights_sha256`; "" when trained or not known."""
    image_size: int | None = None
    """Side of the square input in pixels."""
    mean: list[float] | None = None
    """Taken off each colour channel of an image in 0..1."""
    std: list[float] | None = None
    """Divides each colour channel after that."""
    max_tokens: int | None = None
    """Longer texts are cut."""
    pools: list[str] | None = None
    """Of a sentence encoder: what makes the feature of a text's tokens (model.text.pools)."""


@dataclass
class ModelSpec:
    """The contents of model.json."""

    data: DataSpec
    """Classes and kind of input of the data that the model was trained on."""
    image: BackboneSpec
    text: BackboneSpec
    data_name: str = ""
    attribution: str = ""
    """Source and licence of the training data."""
    captions: dict[str, str] = field(default_factory=lambda: dict(CAPTIONS))
    """What is made of several captions of one picture."""
    progress: dict[str, Any] = field(default_factory=dict)
    """How training stood: "position" in samples, "best" validation score, "best_position", "epoch_samples"."""
    files: dict[str, str] = field(default_factory=dict)
    """Path below best/ -> SHA-256 of the file."""


@dataclass
class Saved:
    """A best/ folder that was read and whose files are what model.json says."""

    folder: Path
    spec: ModelSpec
    config: Config
    tensors: dict[str, Tensor]
    """The generator's, by name."""
    scoring: Scoring
    """How items are compared: `Scoring.plain` until training has ended."""

    @property
    def dim(self) -> int:
        """D, the dimension of the vectors."""
        return self.scoring.dim(self.config.model.common_dim, len(self.spec.data.classes))


# ---------------------------------------------------------------------------------------------- what is kept


def _backbone_spec(
    modality: Modality, config: Config, backbone: ImageBackbone | TextBackbone, details: Mapping[str, Any]
) -> BackboneSpec:
    """`details`: what the data set's manifest says of the backbones that made its features."""
    chosen = config.model.image if modality == "image" else config.model.text
    dim = backbone.dim
    if chosen.name == "features":
        made = details.get(modality) if isinstance(details, dict) else None
        names = ("backbone", "weights", "weights_sha256")
        if not isinstance(made, dict) or not all(isinstance(made.get(name), str) for name in names):
            return BackboneSpec("features", dim)
        known = ("weights", "weights_sha256", "image_size", "max_tokens", "pools", "mean", "std")
        return BackboneSpec(made["backbone"], dim, **{k: made[k] for k in known if k in made})
    if backbone.trainable:  # tokeniser and architecture may come from where the first weights came from
        folder = is_open_clip(chosen.name) and Path(chosen.weights or "\0").is_dir()
        spec = BackboneSpec(chosen.name, dim, True, chosen.weights if chosen.name == "sentence" or folder else "")
    else:
        spec = BackboneSpec(chosen.name, dim, False, chosen.weights, weights_sha256(backbone))
    if isinstance(chosen, ImageBackboneConfig):
        spec.image_size = chosen.image_size
    else:
        spec.max_tokens = chosen.max_tokens
        spec.pools = list(chosen.pools) if chosen.name == "sentence" else None
    if isinstance(backbone, PixelBackbone):
        spec.mean, spec.std = backbone.mean, backbone.std
    return spec


def describe_model(
    config: Config, data: DataSpec, generator: Generator, name: str, attribution: str, details: Mapping[str, Any]
) -> ModelSpec:
    """Return what model.json says of a generator that is about to be trained.

    `name`, `attribution` and `details` are those of the training data's manifest; its details tell which backbones made
    the features of feature shards."""
    return ModelSpec(
        data=data,
        image=_backbone_spec("image", config, generator.image_backbone, details),
        text=_backbone_spec("text", config, generator.text_backbone, details),
        data_name=name,
        attribution=attribution,
    )


def keep_weights(best: Path, spec: ModelSpec) -> None:
    """Copy the weights of frozen backbones that lie in a file or folder of this machine into best/backbones/.

    Changes the spec's `weights` to the copy's path below best/, and adds its files to the spec's `files`. A copy that
    is there already is kept. Weights that are not on this machine stay named by their path. Raises BadInput when they
    cannot be copied."""
    for modality, backbone in (("image", spec.image), ("text", spec.text)):
        source = Path(backbone.weights).resolve()
        kept = f"backbones/{modality}/{source.name}"
        target = best / kept
        named = not backbone.weights or backbone.weights == "hub" or backbone.weights.startswith(("hub:", "package:"))
        if named or not (source.exists() or target.exists()):
            continue
        try:
            if source.exists() and checksums_of(source) != checksums_of(target):
                copy_weights(source, target)
        except OSError as error:
            why = error.strerror or str(error)
            raise BadInput(f"weights {source} cannot be copied to {target} ({why}): free space there") from None
        backbone.weights = kept
        spec.files |= {f"{kept}{name}": checksum for name, checksum in checksums_of(target).items()}


# ---------------------------------------------------------------------------------------------- writing


def save_model(
    best: Path,
    spec: ModelSpec,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    progress: Mapping[str, object],
    vocabulary: Vocabulary | None = None,
    scoring: Scoring | None = None,
) -> None:
    """Replace the model in the folder `best` in one step; the same model gives the same bytes.

    `tensors`: `stored_tensors` of the generator. `progress`: how training stands. Raises BadInput when the folder
    cannot be written."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if scoring is not None:
        stored |= {SCORING + name: tensor.cpu().contiguous() for name, tensor in scoring.tensors().items()}
    files = {MODEL_NAME: save(stored), CONFIG_NAME: to_yaml(public_config(config)).encode()}
    if vocabulary is not None:
        files[VOCABULARY_NAME] = vocabulary.to_json().encode()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    spec = dataclasses.replace(spec, files={**spec.files, **sums}, progress=dict(progress))
    try:
        _finish_save(best)
        for name, content in files.items():
            write_atomic(best / (name + LATER), content)
        commit_files(best, SPEC_NAME, spec_json(spec), files)
    except OSError as error:
        raise BadInput(
            f"the best model could not be written to {best} ({error.strerror}): free space there and start again; the "
            "one before is whole"
        ) from None


def _finish_save(best: Path) -> None:
    """Give the files of a save that was killed after model.json their names: the next save writes over NAME.new."""
    try:
        files = read_spec(best / SPEC_NAME).files
    except BadInput:  # there is none yet, or none that could be used
        return
    for name, checksum in files.items():
        later = best / (name + LATER)
        if later.is_file() and sha256_of(later) == checksum:
            os.replace(later, best / name)


def spec_json(spec: ModelSpec) -> str:
    """Return the text of model.json, which carries a checksum of itself."""
    return sealed_json({"version": VERSION, **dataclasses.asdict(spec)})


def stored_tensors(generator: Generator) -> dict[str, Tensor]:
    """Return the state that a checkpoint and best/ hold: all but frozen backbones whose weights have a source.

    A frozen backbone of random weights has none, so it is stored too."""
    left_out = tuple(
        f"{name}."
        for name, backbone in (("image_backbone", generator.image_backbone), ("text_backbone", generator.text_backbone))
        if not backbone.trainable and not backbone.random
    )
    return {k: v for k, v in generator.state_dict().items() if not k.startswith(left_out or ("\0",))}


# ---------------------------------------------------------------------------------------------- reading


def best_folder(run: str | Path) -> Path:
    """Return the folder with model.json: `run` itself or its best/. Raises BadInput when there is none."""
    refuse_url(run, "run folder")
    run = Path(run)
    for folder in (run, run / BEST):
        if (folder / SPEC_NAME).is_file():
            return folder
    if not run.is_dir():
        raise BadInput(f"run folder {run} does not exist: train it first, or name another")
    raise BadInput(f"{run} has no {BEST}/{SPEC_NAME}: train it first, or name another run")


def read_spec(path: Path) -> ModelSpec:
    """Return what a model.json says. Raises BadInput when it is missing, damaged or of another version."""
    try:
        record = parse_sealed(read_bytes(path), VERSION)
        for name in record["files"]:  # a model may come from anywhere: its files lie below its folder
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise BadInput(f"{path} names the file '{name}', which is outside of its folder: do not use this model")
        parts = {"data": DataSpec, "image": BackboneSpec, "text": BackboneSpec}
        return ModelSpec(**{**record, **{name: kind(**record[name]) for name, kind in parts.items()}})
    except OtherVersion as error:
        raise BadInput(f"{path} has version {error.version}, this program reads {VERSION}: train again") from None
    except BadInput:
        raise
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror}): make it readable, or restore it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}): restore the best/ folder or train again") from None


def whole_file(folder: Path, name: str, expected: str | None) -> Path:
    """Return the file that has the checksum `expected`: NAME, or NAME.new where a save was killed before its last step.

    Raises BadInput when neither has it."""
    for path in (folder / name, folder / (name + LATER)):
        try:
            if expected is not None and sha256_of(path) == expected:
                return path
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Unreadable(f"{path} cannot be read ({error.strerror}): make it readable, or restore it") from None
    state = "is damaged: its checksum is not in" if (folder / name).exists() else "is missing, but named in"
    raise BadInput(f"{folder / name} {state} {SPEC_NAME}: restore the best/ folder or train again")


def read_model(run: str | Path) -> Saved:
    """Read RUN/best, or a copy of that folder. Raises BadInput, naming the file, when one is missing or damaged."""
    folder = best_folder(run)
    spec = read_spec(folder / SPEC_NAME)
    path = whole_file(folder, MODEL_NAME, spec.files.get(MODEL_NAME))
    try:
        tensors = load(read_bytes(path))
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read ({error}): restore it or train again") from None
    found = {name.removeprefix(SCORING): tensors.pop(name) for name in list(tensors) if name.startswith(SCORING)}
    try:
        scoring = Scoring.read(found, spec.data.label_kind == "multi") if found else Scoring.plain()
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} has a scoring that cannot be read ({error!r}): train again") from None
    config = load_config(whole_file(folder, CONFIG_NAME, spec.files.get(CONFIG_NAME)))
    return Saved(folder, spec, config, tensors, scoring)


# ---------------------------------------------------------------------------------------------- building


def _vocabulary_of(saved: Saved) -> Vocabulary | None:
    if saved.config.model.text.name != "cnn":
        return None
    return Vocabulary.load(whole_file(saved.folder, VOCABULARY_NAME, saved.spec.files.get(VOCABULARY_NAME)))


def _source_of(saved: Saved, modality: Modality) -> str:
    """Where the weights of a frozen backbone are now. Raises BadInput when a copy in best/ is damaged."""
    weights: str = getattr(saved.spec, modality).weights
    kept = [name for name in saved.spec.files if name == weights or name.startswith(f"{weights}/")]
    if not weights or not kept:
        return weights
    for name in kept:
        whole_file(saved.folder, name, saved.spec.files[name])
    return str(saved.folder / weights)


def _check_weights(saved: Saved, modality: Modality, backbone: ImageBackbone | TextBackbone) -> None:
    expected = getattr(saved.spec, modality).weights_sha256
    if expected and weights_sha256(backbone) != expected:
        source = getattr(saved.spec, modality).weights
        raise BadInput(
            f"the {modality} backbone {getattr(saved.spec, modality).name} with weights '{source}' is not the one that "
            f"{saved.folder} was trained with (its SHA-256 differs): install or restore those weights"
        )


def load_generator(saved: Saved, *, backbones: bool = True) -> Generator:
    """Return the generator in eval mode, on the CPU.

    `backbones`: with the backbones that it was trained with; False puts precomputed features in their place, [B, F]
    each, so that no other weights are read. Raises BadInput when something does not fit together."""
    config, spec, data = saved.config.model, saved.spec, saved.spec.data
    config = dataclasses.replace(config, image=dataclasses.replace(config.image), text=dataclasses.replace(config.text))
    tensors, vocabulary = saved.tensors, None
    if backbones:
        vocabulary = _vocabulary_of(saved)
        config.image.weights = _source_of(saved, "image")
        config.text.weights = "" if config.text.name == "cnn" else _source_of(saved, "text")
    else:
        config.image.name = config.text.name = "features"
        data = dataclasses.replace(data, image_dim=spec.image.dim, text_dim=spec.text.dim)
        tensors = {k: v for k, v in tensors.items() if not k.startswith(("image_backbone.", "text_backbone."))}
    generator = build_generator(config, data, vocabulary)
    check_shapes(stored_tensors(generator), tensors, str(saved.folder))
    generator.load_state_dict(tensors, strict=False)
    if backbones:
        _set_normalisation(generator.image_backbone, spec.image)
        for modality, chosen in (("image", config.image), ("text", config.text)):
            if chosen.name != "features":
                _check_weights(saved, modality, getattr(generator, f"{modality}_backbone"))  # type: ignore[arg-type]
    return generator.eval()


def load_backbone(saved: Saved, modality: Modality) -> ImageBackbone | TextBackbone:
    """Return the backbone that makes a modality's features from raw input, in eval mode; alone, whatever the other is.

    Also where training was on feature shards. Raises BadInput when nothing says how the features were made, or the
    weights are not there or are others."""
    spec: BackboneSpec = getattr(saved.spec, modality)
    if spec.name == "features":
        raise BadInput(
            f"{saved.folder} takes {modality} features of {spec.dim} numbers and does not say what made them: encode "
            f"arrays of such features, or train on features from 'python -m shards features'"
        )
    kept = {
        k.removeprefix(f"{modality}_backbone."): v
        for k, v in saved.tensors.items()
        if k.startswith(f"{modality}_backbone.")
    }
    weights = _source_of(saved, modality)
    backbone: ImageBackbone | TextBackbone
    if modality == "image":
        size = spec.image_size or ImageBackboneConfig.image_size
        backbone = build_image_backbone(ImageBackboneConfig(spec.name, weights, image_size=size))
    else:
        chosen = dataclasses.replace(saved.config.model.text, name=spec.name, weights=weights, trainable=spec.trained)
        chosen.max_tokens = spec.max_tokens or chosen.max_tokens
        chosen.pools = tuple(spec.pools or TextBackboneConfig.pools)  # type: ignore[arg-type]
        backbone = build_text_backbone(chosen, vocabulary=_vocabulary_of(saved))
    if kept:
        check_shapes(backbone.state_dict(), kept, str(saved.folder))
        backbone.load_state_dict(kept)
    _check_weights(saved, modality, backbone)
    _set_normalisation(backbone, spec)
    return backbone.requires_grad_(False).eval()


def _set_normalisation(backbone: ImageBackbone | TextBackbone, spec: BackboneSpec) -> None:
    """Normalise images as in training: trained weights do not tell what the first ones were made with."""
    if isinstance(backbone, PixelBackbone) and spec.mean is not None and spec.std is not None:
        backbone.set_normalisation(spec.mean, spec.std)


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
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
