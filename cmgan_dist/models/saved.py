"""RUN/best: the trained generator as it is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cmgan_dist.config.fields import CONFIG_NAME, Config
from cmgan_dist.config.load import load_config
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.errors import BadInput
from cmgan_dist.files import write_atomic
from cmgan_dist.models.generator import Generator, build_generator
from cmgan_dist.models.vocabulary import Vocabulary

MODEL = "model.safetensors"


def save_best(run: Path, tensors: dict[str, Tensor], facts: Mapping[str, object]) -> None:
    """Replace RUN/best/model.safetensors in one step; `facts` go into its metadata."""
    metadata = {k: str(v) for k, v in facts.items()}
    packed = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=metadata)
    write_atomic(run / "best" / MODEL, packed)


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


SPEC_NAME = "data.json"
VOCABULARY_NAME = "vocabulary.json"


def load_model(run: Path) -> tuple[Generator, Config, DataSpec]:
    """The best generator of a run. Raises BadInput when something is missing or does not fit together."""
    if not run.is_dir():
        raise BadInput(f"run folder {run} does not exist: train it first, or name another")
    best = run / "best"
    tensors, _ = load_best(run)
    config = load_config(best / CONFIG_NAME)
    path = best / SPEC_NAME
    if not path.is_file():
        raise BadInput(f"{path} does not exist: restore the best/ folder or train again")
    spec = DataSpec(**json.loads(path.read_text(encoding="utf-8")))
    vocabulary = None
    if config.model.text.name == "cnn":
        vocabulary = Vocabulary.load(best / VOCABULARY_NAME)
        config.model.text.weights = ""  # the checkpoint holds the word vectors, the file may be gone
    generator = build_generator(config.model, spec, vocabulary)
    check_shapes(stored_tensors(generator), tensors, str(best))
    generator.load_state_dict(tensors, strict=False)
    return generator, config, spec


def stored_tensors(generator: Generator) -> dict[str, Tensor]:
    """The state that a checkpoint holds: all but frozen backbones, which their config brings back."""
    frozen = tuple(
        f"{name}."
        for name, backbone in (("image_backbone", generator.image_backbone), ("text_backbone", generator.text_backbone))
        if not backbone.trainable
    )
    return {k: v for k, v in generator.state_dict().items() if not k.startswith(frozen or ("\0",))}
