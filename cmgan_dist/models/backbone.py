"""What every backbone is to the networks: `ImageBackbone` and `TextBackbone`; precomputed features are one of each.

A frozen backbone stays in eval mode whatever `train` says, so its BatchNorm statistics never move, and its features
have no gradient.

Shapes: B rows, L words or tokens of the longest text of a batch, F feature dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cmgan_dist.config.fields import ImageBackboneConfig
from cmgan_dist.errors import BadInput
from cmgan_dist.models.weights import UNREADABLE, first_line

TextInput = Tensor | Mapping[str, Tensor]
"""Features [B, F], or tokens: tensors whose first dimension is B."""


class Backbone(nn.Module):
    """What makes features of one modality."""

    dim: int
    """F."""
    trainable: bool
    random = False
    """Frozen at random weights, which nothing but their values brings back."""

    def __init__(self, dim: int, trainable: bool) -> None:
        super().__init__()
        self.dim, self.trainable = dim, trainable

    def settle(self) -> None:
        """Freeze the parameters and leave training mode, unless trainable. Called when all modules are there."""
        self.requires_grad_(self.trainable)
        self.train()

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode and self.trainable)
        return self


class ImageBackbone(Backbone):
    """An image backbone makes float32 features [B, F]. This one takes features that are stored already; its subclasses
    take images."""

    def forward(self, image: Tensor) -> Tensor:
        """Return float32 features [B, F] of B images, or of features that are stored already.

        Images: uint8 [B, H, W, 4] as `decode_image` makes them, or [B, 3, H, W] of uint8 or of floats in 0..1.
        """
        return image.float()


class TextBackbone(Backbone):
    """A text backbone makes float32 features [B, F]. This one takes features that are stored already; its subclasses
    take texts."""

    def tokenise(self, texts: list[str] | Tensor, device: torch.device | str = "cpu") -> TextInput:
        """Return what `forward` takes for B texts, or for features [B, F], on `device`."""
        return stored_features(texts).to(device, non_blocking=True)

    def lengths(self, texts: list[str]) -> list[int]:
        """Return how long each text is, in any unit: texts of like length go through together with little padding."""
        return [len(text) for text in texts]

    def forward(self, tokens: TextInput) -> Tensor:
        """Return float32 features [B, F] of the tokens of B texts, or of features that are stored already."""
        assert isinstance(tokens, Tensor)
        return tokens.float()


class PixelBackbone(ImageBackbone):
    """An image backbone that takes pictures: it normalises them, and `model` makes one vector of each."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, config: ImageBackboneConfig, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """`mean`, `std`: of an image in 0..1 by colour channel. Raises BadInput when the model does not fit."""
        super().__init__(output_dim(model, config), config.trainable)
        self.model = model
        self.random = not config.weights and not config.trainable
        self.set_normalisation([float(x) for x in mean], [float(x) for x in std])

    def set_normalisation(self, mean: list[float], std: list[float]) -> None:
        """Take `mean` off each colour channel of an image in 0..1, and divide by `std`."""
        self.mean, self.std = mean, std
        self.register_buffer("scale", 1 / torch.tensor(std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(mean).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return float32 features [B, F] of images as `ImageBackbone.forward` takes them."""
        if image.dtype == torch.uint8:
            image = (image[..., :3].movedim(-1, 1) if image.shape[-1] == 4 else image) / 255
        image = image.float().contiguous(memory_format=torch.channels_last)  # convolutions on CPU take half the time
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            features: Tensor = self.model((image - self.shift) * self.scale)
        return features.float()


@torch.no_grad()
def output_dim(model: nn.Module, config: ImageBackboneConfig) -> int:
    """F, from one picture. Raises BadInput when the model does not make one vector of it."""
    model.eval()
    try:
        made = model(torch.zeros(1, 3, config.image_size, config.image_size))
    except (ArithmeticError, *UNREADABLE) as error:
        raise BadInput(
            f"model.image.image_size is {config.image_size}: {config.name} cannot take it ({first_line(error)}): "
            "set another, or name another model"
        ) from None
    if not isinstance(made, Tensor) or made.ndim != 2:
        raise BadInput(f"model.image.name is '{config.name}', which does not make one vector of an image: name another")
    _check_patches(model, config)
    return made.shape[1]


def _check_patches(model: nn.Module, config: ImageBackboneConfig) -> None:
    """Raise BadInput where patches do not fill the picture, so that the model would see a part of it: timm says so
    itself, open_clip does not."""
    patch, size = getattr(model, "patch_size", None), config.image_size
    if isinstance(patch, tuple) and size % patch[0]:
        below, above = size // patch[0] * patch[0], -(-size // patch[0]) * patch[0]
        raise BadInput(
            f"model.image.image_size is {size}, and {config.name} takes whole patches of {patch[0]} pixels: set it to "
            f"{f'{below} or ' * bool(below)}{above}"
        )


def stored_features(texts: list[str] | Tensor) -> Tensor:
    """Return the features [B, F]. Raises BadInput where there are texts instead."""
    if not isinstance(texts, Tensor):
        raise BadInput("model.text.name is 'features' but the texts are raw: name a text backbone")
    return texts


def raw_texts(texts: list[str] | Tensor) -> list[str]:
    """Return the texts. Raises BadInput where there are features instead."""
    if isinstance(texts, Tensor):
        raise BadInput("model.text.name is a text backbone but the texts are features: set it to features")
    return texts
