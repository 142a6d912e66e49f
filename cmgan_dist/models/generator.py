"""How images and texts become common representations: the generator's encoders, shared layers, classifiers, decoders.

The layers are those of Peng, Qi & Yuan (2019), arXiv 1710.05106, as docs/reference.md lists them. Nothing here knows of
processes.

Shapes: B rows, F feature dimensions of a modality (F_i image, F_t text), H hidden, E common, C classes.
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
from cmgan_dist.kernels.dropout import dropout
from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.models.backbone import ImageBackbone, TextBackbone, TextInput
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone
from cmgan_dist.models.vocabulary import Vocabulary

SLOPE = 0.2
"""The slope of every LeakyReLU."""
JOINED_ON_CPU = 512
"""Rows of a modality up to which both modalities go through one GEMM on a CPU: measured x1.5 at 16 and x1.2 at 64, but
nothing or a loss at 1024 (docs/kernels.md)."""

Modality = Literal["image", "text"]
"""The name of a modality, as configs, modules and log keys have it."""


@dataclass
class Reconstruction:
    """A decoder's output [B, F], hidden @ weight.T + bias, which is only built where it is asked for.

    The intra-modality discriminators are linear: what they make of it needs one matrix-vector product,
    w . (W h + b) = h . (W^T w) + w . b, and no row of F numbers."""

    hidden: Tensor
    """[B, H]: what the decoder's last layer takes."""
    weight: Tensor
    """[F, H]: the last layer's weight W."""
    bias: Tensor
    """[F]: the last layer's bias b."""

    def dense(self) -> Tensor:
        """Return the whole output, [B, F]; where autocast is off, in fp32."""
        return F.linear(self.hidden.float(), self.weight, self.bias)

    def along(self, direction: Tensor) -> Tensor:
        """Return the product of the output with each of D directions, given as [D, F]: [B, D] in fp32."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return F.linear(self.hidden.float(), direction @ self.weight, direction @ self.bias)

    def rows(self, first: int, stop: int) -> Reconstruction:
        """Return the reconstruction of the rows from `first` up to `stop`."""
        return Reconstruction(self.hidden[first:stop], self.weight, self.bias)


@dataclass
class ModalityOutput:
    """What the generator makes of one modality's rows."""

    feature: Tensor
    """[B, F]: backbone features, detached, which the discriminators call real and condition on."""
    common: Tensor
    """[B, E]: common representations."""
    logits: Tensor | None
    """[B, C]: class logits in fp32; None without classes or when not asked for."""
    reconstruction: Reconstruction | None
    """The decoder's output [B, F]; None when not asked for."""

    def rows(self, first: int, stop: int) -> ModalityOutput:
        """Return feature, common representation and reconstruction of the rows from `first` up to `stop`."""
        made = None if self.reconstruction is None else self.reconstruction.rows(first, stop)
        return ModalityOutput(self.feature[first:stop], self.common[first:stop], None, made)


class SharedLayers(nn.Module):
    """Linear(H, E) BN LeakyReLU with parameters shared by both modalities and BN statistics per modality.

    The linear layer has no bias: BatchNorm would take it out again, and it would have no gradient. With
    model.share_layers false each modality has layers of its own."""

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
        """Return whether rows of both modalities, [B, H] each, go through one GEMM.

        They do on a GPU (half the launches), among processes (one collective for both modalities) and, on a CPU, up to
        JOINED_ON_CPU rows."""
        synchronised = any(isinstance(norm, GroupBatchNorm) and norm.synchronised for norm in self.norm)
        small = max(len(image), len(text)) <= JOINED_ON_CPU
        return self.shared and (small or synchronised or image.device.type != "cpu")

    def forward(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the common representations [B, E] of hidden rows [B, H] of each modality, None for None.

        With shared layers both modalities go through one GEMM where that is faster; the function is the same either
        way."""
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
    """What happens to features before the first layer, by model.input_norm, before dropout: nothing (none), they are
    standardised per dimension without affine parameters (batch), or they get unit length (l2)."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.dropout = config.input_norm, config.input_dropout
        self.norm = None
        if self.kind == "batch":
            self.norm = GroupBatchNorm(features, affine=False, dropout=config.input_dropout, kernels=config.kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features x [B, F] normalised and, in training, with dropout: [B, F]."""
        if self.norm is not None:
            out: Tensor = self.norm(x, [len(x)])
            return out
        x = F.normalize(x.float(), dim=1) if self.kind == "l2" else x
        return dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Modality-specific layer: Linear(F, H) BN LeakyReLU dropout, after optional input normalisation and dropout."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = InputNorm(features, config)
        self.linear = nn.Linear(features, config.hidden_dim, bias=False)
        self.norm = GroupBatchNorm(config.hidden_dim, slope=SLOPE, dropout=config.dropout, kernels=config.kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden representation [B, H] of features x [B, F]."""
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
        """Return the reconstruction [B, F] of features from common representations [B, E]."""
        weight, bias = self.out.weight, self.out.bias
        # as views: without gradients these are constants, but parameters themselves would still get gradients
        return Reconstruction(self.norm(self.hidden(common), [len(common)]), weight.view_as(weight), bias.view_as(bias))


class Generator(nn.Module):
    """Encoders, shared layers, classifiers and decoders of both modalities, with their backbones.

    A frozen backbone is run once per batch by `extract`, outside of the gradient; `forward` then takes its features.
    A trained backbone is run by `forward`, which takes raw input (uint8 images, tokens)."""

    def __init__(
        self, config: ModelConfig, image_backbone: ImageBackbone, text_backbone: TextBackbone, classes: int
    ) -> None:
        """Build the layers on top of both backbones; `classes` is C, or 0 for pairs without labels."""
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
        """Return what `forward` takes: features [B, F] of frozen backbones, raw input as it is of trained ones."""
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
        """Return the common representations [N, E] of image features [N, F_i]; texts are not needed."""
        common, _ = self.shared(self.image_encoder(features), None)
        assert common is not None
        return common

    def project_texts(self, features: Tensor) -> Tensor:
        """Return the common representations [M, E] of text features [M, F_t]; images are not needed."""
        _, common = self.shared(None, self.text_encoder(features))
        assert common is not None
        return common

    def forward(
        self, image: Tensor | None, text: TextInput | None, *, classify: bool = True, decode: bool = True
    ) -> tuple[ModalityOutput | None, ModalityOutput | None]:
        """Return what is made of images and of texts; None for a modality whose input is None.

        Inputs are what `extract` returned. `classify`: with class logits; `decode`: with reconstructions."""
        f_image, f_text = self._features(image, text)
        common_image, common_text = self.shared(
            None if f_image is None else self.image_encoder(f_image),
            None if f_text is None else self.text_encoder(f_text),
        )
        return (
            self._output(f_image, common_image, 0, self.image_decoder, classify, decode),
            self._output(f_text, common_text, -1, self.text_decoder, classify, decode),
        )

    def _output(
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
    """A generator with the parameters of one modality's way through it and no others.

    DDP around it sends the gradients that a phase of that modality has, and not zeros for the other modality's."""

    def __init__(self, generator: Generator, modality: Modality) -> None:
        """List the parameters of `generator` that an input of `modality` alone reaches."""
        super().__init__()
        self._generator = (generator,)  # not as a submodule: that would bring all parameters
        last = 0 if modality == "image" else -1
        shared = generator.shared
        parts = [getattr(generator, f"{modality}_{part}") for part in ("backbone", "encoder", "decoder")]
        self.used = nn.ModuleList(parts)
        self.used += [shared.linear[last], shared.norm[last], *list(generator.classifiers)[last:][:1]]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the generator's own forward, with its arguments."""
        return self._generator[0](*inputs, **options)


def build_generator(config: ModelConfig, spec: DataSpec, vocabulary: Vocabulary | None) -> Generator:
    """Return the generator that `config` asks for on data of the kind `spec`; `vocabulary` is for the text CNN.

    Raises BadInput when config and data do not fit together: features where raw data is expected, or the reverse."""
    for modality, backbone, dim in (("image", config.image, spec.image_dim), ("text", config.text, spec.text_dim)):
        if backbone.name == "features" and dim is None:
            raise BadInput(
                f"model.{modality}.name is 'features' but the data holds raw {modality}s: name a backbone of "
                f"{modality}s, or write features with 'python -m shards features'"
            )
        if backbone.name != "features" and dim is not None:
            raise BadInput(
                f"model.{modality}.name is '{backbone.name}' but the data holds {modality} features: set it to features"
            )
    return Generator(
        config,
        build_image_backbone(config.image, spec.image_dim),
        build_text_backbone(config.text, spec.text_dim, vocabulary),
        len(spec.classes),
    )
