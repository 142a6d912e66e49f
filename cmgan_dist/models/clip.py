"""Towers of CLIP-family models (Radford et al., ICML 2021) as backbones, by the package open_clip.

``open_clip:NAME`` is a model that ``open_clip.list_models()`` names. Its weights: "" random, "hub:TAG" one of
``open_clip.list_pretrained_tags_by_model(NAME)``, a file, or a folder as open_clip stores it (open_clip_config.json
beside the weights), whose architecture then counts. Only the tower that is asked for is kept; its output is that of the
model's projection, not normalised.

Shapes: B rows, L tokens of the longest text of a batch, F feature dimension."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json, read_bytes
from cmgan_dist.models.backbone import PixelBackbone, TextBackbone, TextInput, raw_texts
from cmgan_dist.models.weights import UNREADABLE, check_folder, first_line

PREFIX = "open_clip:"
"""What the names of these backbones begin with."""
CONFIG_NAME = "open_clip_config.json"
"""What a folder of a stored model holds."""
SUFFIXES = (".safetensors", ".bin", ".pth")
"""Of the weights in such a folder."""
MARKS = 2
"""Tokens of a text that mark its beginning and its end."""


def is_open_clip(name: str) -> bool:
    """Return whether a backbone's name asks for a tower of open_clip."""
    return name.startswith(PREFIX)


def _open_clip(field: str) -> Any:
    try:
        import open_clip
    except ImportError:
        raise BadInput(f"{field} needs the package open_clip: pip install 'cmgan-dist[clip]'") from None
    return open_clip


def _identifier(config: ImageBackboneConfig | TextBackboneConfig, field: str) -> tuple[str, str | None]:
    """Return what open_clip calls the model, and its weights. Raises BadInput, naming the field, when neither is."""
    package, name, weights = _open_clip(f"{field}.name"), config.name.removeprefix(PREFIX), config.weights
    if weights and Path(weights).is_dir():
        _text_config(Path(weights), field)
        _check_weights(Path(weights), field)
        return f"local-dir:{weights}", None
    if name not in package.list_models():
        close = difflib.get_close_matches(name, package.list_models(), 3)
        hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
        raise BadInput(f"{field}.name is '{config.name}', which is not a model of open_clip: {hint}")
    if weights.startswith("hub"):
        tag, tags = weights.removeprefix("hub").removeprefix(":"), package.list_pretrained_tags_by_model(name)
        if tag not in tags:
            known = f"name one of {', '.join(f'hub:{t}' for t in tags)}" if tags else "the hub has none: name a file"
            raise BadInput(f"{field}.weights is '{weights}': for {name} {known}")
        return name, tag
    if weights and not Path(weights).is_file():
        what = "is no file" if Path(weights).exists() else "does not exist"
        raise BadInput(f"{field}.weights: {weights} {what}: give a file, a folder with {CONFIG_NAME} or hub:TAG")
    return name, weights or None


def _check_weights(folder: Path, field: str) -> None:
    """Raise BadInput where open_clip would find no weights in a folder, and draw some without a word."""
    if not any(path.suffix in SUFFIXES for path in folder.iterdir()):
        raise BadInput(
            f"{field}.weights: folder {folder} holds no {', '.join(SUFFIXES)}, so that weights would be random: put "
            "the weights there, or give their file"
        )


def _text_config(folder: Path, field: str) -> dict[str, Any]:
    """Return what a folder says of its text tower. Raises BadInput when it is no folder of open_clip, or names a model
    of a hub for it: what lies in a folder from elsewhere runs no code of its own."""
    path = folder / CONFIG_NAME
    try:
        check_folder(folder)
        found: dict[str, Any] = parse_json(read_bytes(path))["model_cfg"]["text_cfg"]
        foreign = found.get("hf_model_name")
    except FileNotFoundError:
        raise BadInput(f"{field}.weights: folder {folder} has no {CONFIG_NAME}: give the file of the weights") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{field}.weights: {path} cannot be used ({first_line(error)}): restore it") from None
    if foreign is not None:
        raise BadInput(f"{field}.weights: the text tower of {path} is of a hub ({foreign}): give another model")
    return found


def made_for(config: ImageBackboneConfig | TextBackboneConfig, field: str) -> int:
    """Return the side of the square in pixels, or the tokens, that a tower is made for. Raises BadInput."""
    name, _ = _identifier(config, field)
    part, key, usual = (
        ("vision_cfg", "image_size", 224) if field == "model.image" else ("text_cfg", "context_length", 77)
    )
    try:
        found = _open_clip(f"{field}.name").get_model_config(name)[part].get(key, usual)
        sides = {int(side) for side in (found if isinstance(found, list) else [found])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{field}: {part} of {config.name} cannot be used ({first_line(error)}): restore it") from None
    return max(sides)


def _model(config: ImageBackboneConfig | TextBackboneConfig, field: str, **options: Any) -> Any:
    """Return the whole model with its text tower apart, on the CPU. Raises BadInput naming the field."""
    (name, weights), package = _identifier(config, field), _open_clip(f"{field}.name")
    logging.disable(logging.WARNING)  # it tells the root logger each step
    try:
        return package.create_model(
            name, weights, force_custom_text=True, pretrained_text=False, weights_only=True, **options
        )
    except UNREADABLE as error:
        raise BadInput(
            f"{field}: open_clip cannot make {config.name} with weights '{config.weights}' ({first_line(error)}): "
            "name the model that these weights are of, or get them again where some are missing"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def _checkpoint_activations(tower: nn.Module, field: str) -> None:
    try:
        tower.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, TypeError):
        raise BadInput(f"{field}.checkpoint: open_clip has none for this tower: set it to false") from None


class ClipImageBackbone(PixelBackbone):
    """The image tower of a CLIP-family model, with the normalisation that its weights were trained with."""

    def __init__(self, config: ImageBackboneConfig) -> None:
        """Raises BadInput naming the field."""
        tower = _model(config, "model.image", force_image_size=config.image_size).visual
        super().__init__(tower, config, tower.image_mean, tower.image_std)
        if config.checkpoint and config.trainable:
            _checkpoint_activations(tower, "model.image")
        self.settle()


class ClipTextBackbone(TextBackbone):
    """The text tower of a CLIP-family model, with its tokeniser.

    Where no token sees those behind it and the end token is the text's feature, as in CLIP itself, a batch is as long
    as its longest text; other towers (SigLIP's) always take all the tokens that they know."""

    def __init__(self, config: TextBackboneConfig) -> None:
        """Raises BadInput naming the field."""
        if config.pools != ("sentence",):
            raise BadInput(
                f"model.text.pools is '{','.join(config.pools)}': {config.name} has its own pooling: set it to sentence"
            )
        tower = _model(config, "model.text").text
        context = int(tower.context_length)
        causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "pool_type", "") == "argmax"
        causal = causal and getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
        length = min(config.max_tokens, context) if causal else context
        if length <= MARKS:
            raise BadInput(
                f"model.text.max_tokens is {config.max_tokens} and {MARKS} tokens of each text mark its ends, so that "
                f"no word is left: set it to {MARKS + 1} or more"
            )
        tokeniser = _tokeniser(config, length)
        with torch.no_grad():
            dim = tower.eval()(torch.zeros(1, context, dtype=torch.int64)).shape[1]
        super().__init__(dim, config.trainable)
        self.model, self.tokeniser, self.causal, self.context = tower, tokeniser, causal, context
        self.random = not config.weights and not config.trainable
        if config.checkpoint and config.trainable:
            _checkpoint_activations(tower, "model.text")
        self.settle()

    def tokenise(self, texts: list[str] | Tensor, device: torch.device | str = "cpu") -> TextInput:
        """Return {"ids": int64 [B, L]} of B texts, cut at `max_tokens`, with 0 behind the end."""
        ids = self.tokeniser(raw_texts(texts))
        if self.causal:
            ids = ids[:, : max(1, int((ids != 0).sum(1).max()))]
        return {"ids": ids.to(device)}

    def lengths(self, texts: list[str]) -> list[int]:
        """Return the tokens of each text."""
        return [int(n) for n in (self.tokeniser(texts) != 0).sum(1)]

    def forward(self, tokens: TextInput) -> Tensor:
        """Return float32 features [B, F] of the tokens of B texts."""
        assert isinstance(tokens, Mapping)
        ids, tensors = tokens["ids"], {}
        if self.causal:
            tensors["attn_mask"] = self.model.attn_mask[: ids.shape[1], : ids.shape[1]]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            features: Tensor = torch.func.functional_call(self.model, tensors, (ids,))
        return features.float()


def _tokeniser(config: TextBackboneConfig, length: int) -> Any:
    """Return the model's own tokeniser. Raises BadInput where it lies on a hub that cannot be reached."""
    name, _ = _identifier(config, "model.text")
    of_hub = name.startswith("local-dir:") and "hf_tokenizer_name" in _text_config(Path(config.weights), "model.text")
    safe = {"trust_remote_code": False} if of_hub else {}  # whatever the folder itself says
    try:
        return _open_clip("model.text.name").get_tokenizer(name, context_length=length, **safe)
    except (ImportError, *UNREADABLE) as error:
        raise BadInput(
            f"model.text.name is '{config.name}', whose tokeniser cannot be loaded ({first_line(error)}): give a "
            "folder that holds it as model.text.weights, or take 'sentence'"
        ) from None
