"""The generator: backbones, encoders, shared layers, classifiers, decoders (recipe: Networks).

Shapes: B rows, F_i and F_t feature dimensions, H hidden, E common, C classes. Nothing here knows of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.errors import BadInput
from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.models.backbones import (
    ImageBackbone,
    TextBackbone,
    TextInput,
    build_image_backbone,
    build_text_backbone,
)
from cmgan_dist.models.vocabulary import Vocabulary

SLOPE = 0.2
"""Of every LeakyReLU."""
JOINED_ON_CPU = 512
"""Rows of a modality up to which both go through one GEMM on a CPU: measured x1.5 at 16 and x1.2 at 64, but nothing or
a loss at 1024 (docs/kernels.md)."""


@dataclass
class Reconstruction:
    """A decoder's output [B, F], hidden @ weight.T + bias, which is only built where it is asked for.

    The intra-modality discriminators are linear: what they make of it needs one matrix-vector product,
    w . (W h + b) = h . (W^T w) + w . b, and no row of F numbers."""

    hidden: Tensor
    """[B, H] what the decoder's last layer takes."""
    weight: Tensor
    """[F, H]."""
    bias: Tensor
    """[F]."""

    def dense(self) -> Tensor:
        """[B, F]."""
        return F.linear(self.hidden, self.weight, self.bias)

    def along(self, direction: Tensor) -> Tensor:
        """Its product with each direction [D, F], in fp32: [B, D]."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return F.linear(self.hidden.float(), direction @ self.weight, direction @ self.bias)

    def rows(self, first: int, stop: int) -> Reconstruction:
        return Reconstruction(self.hidden[first:stop], self.weight, self.bias)


@dataclass
class ModalityOutput:
    """What the generator makes of one modality."""

    feature: Tensor
    """[B, F] backbone features, detached: what the discriminators call real and condition on."""
    common: Tensor
    """[B, E] common representation."""
    logits: Tensor | None
    """[B, C] class logits, fp32; None without classes or when not asked for."""
    reconstruction: Reconstruction | None
    """Decoder output; None when not asked for."""

    def rows(self, first: int, stop: int) -> ModalityOutput:
        """Rows first..stop of feature, common and reconstruction."""
        made = None if self.reconstruction is None else self.reconstruction.rows(first, stop)
        return ModalityOutput(self.feature[first:stop], self.common[first:stop], None, made)


class SharedLayers(nn.Module):
    """Linear(H, E) BN LeakyReLU with parameters shared by both modalities and BN statistics per modality.

    The linear layer has no bias: BatchNorm takes it out again and it has no gradient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared = config.share_layers
        copies = 1 if self.shared else 2
        slope = SLOPE if config.common_activation else 1.0
        self.linear = nn.ModuleList(nn.Linear(config.hidden_dim, config.common_dim, bias=False) for _ in range(copies))
        self.norm = nn.ModuleList(
            GroupBatchNorm(config.common_dim, statistics=2 // copies, slope=slope, kernels=config.kernels)
            for _ in range(copies)
        )

    def _apply_group(self, x: Tensor, groups: list[int], modality: int) -> Tensor:
        copy = 0 if self.shared else modality
        first = modality if self.shared else 0
        out: Tensor = self.norm[copy](self.linear[copy](x), groups, first)
        return out

    def joins(self, image: Tensor, text: Tensor) -> bool:
        """Whether rows of both modalities go through one GEMM: always on a GPU (half the launches) and among processes
        (one collective for both modalities)."""
        synchronised = any(isinstance(norm, GroupBatchNorm) and norm.synchronised for norm in self.norm)
        small = max(len(image), len(text)) <= JOINED_ON_CPU
        return self.shared and (small or synchronised or image.device.type != "cpu")

    def forward(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """[B, H] each -> [B, E] each. With shared layers both modalities go through one GEMM where that is faster; the
        function is the same either way."""
        if image is not None and text is not None and self.joins(image, text):
            rows = [len(image), len(text)]
            joined = self._apply_group(torch.cat([image, text]), rows, 0)
            image_common, text_common = joined.split(rows)
            return image_common, text_common
        return (
            None if image is None else self._apply_group(image, [len(image)], 0),
            None if text is None else self._apply_group(text, [len(text)], 1),
        )


class InputNorm(nn.Module):
    """Features before the first layer: unchanged, standardised per dimension without affine, or unit length; then
    dropout."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.dropout = config.input_norm, config.input_dropout
        self.norm = None
        if self.kind == "batch":
            self.norm = GroupBatchNorm(features, affine=False, dropout=config.input_dropout, kernels=config.kernels)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            out: Tensor = self.norm(x, [len(x)])
            return out
        x = F.normalize(x.float(), dim=1) if self.kind == "l2" else x
        return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Modality-specific layer: Linear(F, H) BN LeakyReLU dropout, after optional input normalisation and dropout."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = InputNorm(features, config)
        self.linear = nn.Linear(features, config.hidden_dim, bias=False)
        self.norm = GroupBatchNorm(config.hidden_dim, slope=SLOPE, dropout=config.dropout, kernels=config.kernels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F] -> [B, H]."""
        out: Tensor = self.norm(self.linear(self.input_norm(x)), [len(x)])
        return out


class Decoder(nn.Module):
    """Common representation back to the modality's own feature: Linear(E, H) BN LeakyReLU Linear(H, F)."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.common_dim, config.hidden_dim, bias=False)
        self.norm = GroupBatchNorm(config.hidden_dim, slope=SLOPE, kernels=config.kernels)
        self.out = nn.Linear(config.hidden_dim, features)

    def forward(self, common: Tensor) -> Reconstruction:
        """[B, E] -> [B, F]."""
        weight, bias = self.out.weight, self.out.bias
        # as views: DeepSpeed reduces the gradients of parameters that leave a forward by themselves twice
        return Reconstruction(self.norm(self.hidden(common), [len(common)]), weight.view_as(weight), bias.view_as(bias))


class Generator(nn.Module):
    """Encoders, shared layers, classifiers and decoders of both modalities, with their backbones.

    A frozen backbone is run once per batch by `extract`, outside of the gradient; `forward` then takes its features.
    A trained backbone is run by `forward`, which takes raw input (uint8 images, tokens)."""

    def __init__(
        self, config: ModelConfig, image_backbone: ImageBackbone, text_backbone: TextBackbone, classes: int
    ) -> None:
        """`classes`: C, 0 for pairs without labels."""
        super().__init__()
        self.image_backbone, self.text_backbone = image_backbone, text_backbone
        f_image, f_text = image_backbone.dim, text_backbone.dim
        self.image_encoder, self.text_encoder = Encoder(f_image, config), Encoder(f_text, config)
        self.shared = SharedLayers(config)
        heads = 0 if not classes else 1 if config.share_classifier else 2
        self.classifiers = nn.ModuleList(nn.Linear(config.common_dim, classes) for _ in range(heads))
        self.image_decoder, self.text_decoder = Decoder(f_image, config), Decoder(f_text, config)

    @torch.no_grad()
    def extract(self, image: Tensor, text: TextInput) -> tuple[Tensor, TextInput]:
        """What `forward` takes: features [B, F] of frozen backbones, raw input of trained ones."""
        if not self.image_backbone.trainable:
            image = self.image_backbone(image)
        if not self.text_backbone.trainable:
            text = self.text_backbone(text)
        return image, text

    def _features(self, image: Tensor | None, text: TextInput | None) -> tuple[Tensor | None, Tensor | None]:
        if image is not None and self.image_backbone.trainable:
            image = self.image_backbone(image)
        if text is not None and self.text_backbone.trainable:
            text = self.text_backbone(text)
        assert text is None or isinstance(text, Tensor)
        return image, text

    def project_images(self, features: Tensor) -> Tensor:
        """Image features [N, F_i] -> common representations [N, E]."""
        common, _ = self.shared(self.image_encoder(features), None)
        assert common is not None
        return common

    def project_texts(self, features: Tensor) -> Tensor:
        """Text features [M, F_t] -> common representations [M, E]."""
        _, common = self.shared(None, self.text_encoder(features))
        assert common is not None
        return common

    def forward(
        self, image: Tensor | None, text: TextInput | None, *, classify: bool = True, decode: bool = True
    ) -> tuple[ModalityOutput | None, ModalityOutput | None]:
        """Both sides, or one when the other input is None. Inputs are those of `extract`."""
        f_image, f_text = self._features(image, text)
        common_image, common_text = self.shared(
            None if f_image is None else self.image_encoder(f_image),
            None if f_text is None else self.text_encoder(f_text),
        )
        return (
            self._side(f_image, common_image, 0, self.image_decoder, classify, decode),
            self._side(f_text, common_text, -1, self.text_decoder, classify, decode),
        )

    def _side(
        self,
        feature: Tensor | None,
        common: Tensor | None,
        head: int,
        decoder: nn.Module,
        classify: bool,
        decode: bool,
    ) -> ModalityOutput | None:
        if feature is None or common is None:
            return None
        return ModalityOutput(
            feature=feature.detach(),
            common=common,
            logits=self.classifiers[head](common).float() if classify and len(self.classifiers) else None,
            reconstruction=decoder(common) if decode else None,
        )


class SingleModalityGenerator(nn.Module):
    """A generator with the parameters of one modality's way through it and no others: DDP around it sends the gradients
    that a phase of that side has, not zeros for the other side's."""

    def __init__(self, generator: Generator, side: Literal["image", "text"]) -> None:
        super().__init__()
        self._generator = (generator,)  # not as a submodule: that would bring all parameters
        last = 0 if side == "image" else -1
        shared = generator.shared
        self.used = nn.ModuleList([getattr(generator, f"{side}_{part}") for part in ("backbone", "encoder", "decoder")])
        self.used += [shared.linear[last], shared.norm[last], *list(generator.classifiers)[last:][:1]]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the generator's."""
        return self._generator[0](*inputs, **options)


# ---------------------------------------------------------------------------------------------- assembly


def build_generator(config: ModelConfig, spec: DataSpec, vocabulary: Vocabulary | None) -> Generator:
    """The generator of a config for data of this kind; `vocabulary` is for the text CNN.

    Raises BadInput when config and data do not fit together."""
    for side, backbone, dim in (("image", config.image, spec.image_dim), ("text", config.text, spec.text_dim)):
        if backbone.name == "features" and dim is None:
            raise BadInput(
                f"model.{side}.name is 'features' but the data holds raw {side}s: name a {side} backbone, "
                "or write features with 'python -m shards features'"
            )
        if backbone.name != "features" and dim is not None:
            raise BadInput(
                f"model.{side}.name is '{backbone.name}' but the data holds {side} features: set it to features"
            )
    return Generator(
        config,
        build_image_backbone(config.image, spec.image_dim),
        build_text_backbone(config.text, spec.text_dim, vocabulary),
        len(spec.classes),
    )
