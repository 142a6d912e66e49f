"""The rival of bench/step.py: the reference algorithm of CM-GANs written straight in plain PyTorch.

Peng, Qi & Yuan (ACM TOMM 2019): per batch D_T, D_I, D_CT, D_CI once each, then five times the generator's image side
and text side. Every phase runs its own forwards; image and text pass the shared layers one after the other; real, fake
and mismatched rows pass a discriminator one after the other; six Adam optimisers. Nothing here is tuned and nothing is
handicapped: no needless gradient is computed (discriminators are frozen in generator phases, fakes are made without
gradient), and there is no log, no clip and no copy. Nothing of cmgan_dist is used, so that its tests can lean on it.

It computes what preset `reference` computes, and the losses agree (tests/bench/test_reference_step.py). That took four
choices where a port may choose:

- One optimiser owns each unique parameter: the shared layers belong to the image side's. Both generator optimisers step
  in both generator phases, and what has no gradient does not move, so the shared layers' moments see all ten updates.
- The forwards of discriminator phases run over right and wrong rows together, [2B]: BatchNorm statistics of fakes are
  those of 2B rows. `joined=False` runs them apart, and only the rows that a phase needs: less work, but other losses.
- No bias before a BatchNorm, where it has no gradient.
- Running statistics, which no training loss reads, move at every forward: four times as often as they need to in
  discriminator phases. They differ from the library's.

Shapes: B rows, F_i and F_t features, H hidden, E common, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
DISCRIMINATORS = ("d_text", "d_image", "d_text_inter", "d_image_inter")


@dataclass(frozen=True)
class Dims:
    """Widths of the reference recipe."""

    image: int = 4096
    """F_i: VGG19 fc7."""
    text: int = 300
    """F_t."""
    hidden: int = 1024
    common: int = 1024
    discriminator: int = 512
    classes: int = 10


@dataclass
class Rows:
    """One batch: B right rows and as many wrong ones, of another class each."""

    image: Tensor
    """[B, F_i]"""
    text: Tensor
    """[B, F_t]"""
    wrong_image: Tensor
    wrong_text: Tensor
    labels: Tensor
    """int64 [B]"""


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Linear BN LeakyReLU."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.LeakyReLU(SLOPE))


class GeneratorSide(nn.Module):
    """One modality: encoder, shared layers, classifier, decoder."""

    def __init__(self, features: int, dims: Dims) -> None:
        super().__init__()
        self.encoder = block(features, dims.hidden)
        self.shared = block(dims.hidden, dims.common)
        self.classifier = nn.Linear(dims.common, dims.classes)
        self.decoder = nn.Sequential(*block(dims.common, dims.hidden), nn.Linear(dims.hidden, features))

    def forward(self, feature: Tensor) -> Tensor:
        """[R, F] -> common representation [R, E]."""
        return self.shared(self.encoder(feature))


class InterDiscriminator(nn.Module):
    """D_CI, D_CT: does this common representation belong to this feature?"""

    def __init__(self, features: int, dims: Dims) -> None:
        super().__init__()
        self.hidden = block(dims.common + features, dims.discriminator)
        self.out = nn.Linear(dims.discriminator, 1)

    def forward(self, common: Tensor, feature: Tensor) -> Tensor:
        """[B, E], [B, F] -> logits [B, 1]."""
        return self.out(self.hidden(torch.cat([common, feature], dim=1)))


def bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, target, dtype=torch.float32))


class ReferenceStep(nn.Module):
    """Networks, optimisers and the updates of one batch."""

    def __init__(
        self,
        dims: Dims,
        *,
        rate: float = 1e-3,
        beta1: float = 0.5,
        generator_steps: int = 5,
        precision: str = "fp32",
        joined: bool = True,
        fused: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """`precision`: fp32 or bf16 autocast. `fused`: Adam's own switch, None is torch's default. `compiled`: losses
        and optimiser steps by torch.compile."""
        super().__init__()
        self.generator_steps, self.precision, self.joined = generator_steps, precision, joined
        self.image, self.text = GeneratorSide(dims.image, dims), GeneratorSide(dims.text, dims)
        self.text.shared[0] = self.image.shared[0]
        self.text.shared[1].weight, self.text.shared[1].bias = self.image.shared[1].weight, self.image.shared[1].bias
        self.d_image, self.d_text = nn.Linear(dims.image, 1), nn.Linear(dims.text, 1)
        self.d_image_inter = InterDiscriminator(dims.image, dims)
        self.d_text_inter = InterDiscriminator(dims.text, dims)

        def adam(parameters: list[nn.Parameter]) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, lr=rate, betas=(beta1, 0.999), fused=fused)

        owned = {id(p) for p in self.image.parameters()}
        self.optimizers = {
            "image": adam(list(self.image.parameters())),
            "text": adam([p for p in self.text.parameters() if id(p) not in owned]),
            **{name: adam(list(getattr(self, name).parameters())) for name in DISCRIMINATORS},
        }
        maybe: Callable[..., Any] = torch.compile if compiled else lambda function: function
        self.losses: dict[str, Callable[[Rows], Tensor]] = {
            "D_T": maybe(self.loss_d_text),
            "D_I": maybe(self.loss_d_image),
            "D_CT": maybe(self.loss_d_text_inter),
            "D_CI": maybe(self.loss_d_image_inter),
            "G_I": maybe(self.loss_image),
            "G_T": maybe(self.loss_text),
        }
        self.steps = {name: maybe(optimizer.step) for name, optimizer in self.optimizers.items()}

    # ------------------------------------------------------------------------------------------ discriminators

    @torch.no_grad()
    def fakes(self, side: GeneratorSide, right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """Common representations of right and wrong rows, [B, E] each."""
        if not self.joined:
            return side(right), side(wrong)
        right_common, wrong_common = side(torch.cat([right, wrong])).chunk(2)
        return right_common, wrong_common

    @torch.no_grad()
    def reconstruction(self, side: GeneratorSide, right: Tensor, wrong: Tensor) -> Tensor:
        """Decoder output for the right rows, [B, F]."""
        if not self.joined:
            return side.decoder(side(right))
        return side.decoder(side(torch.cat([right, wrong]))).chunk(2)[0]

    def loss_d_text(self, rows: Rows) -> Tensor:
        """D_T: text feature -> 1, reconstruction -> 0."""
        fake = self.reconstruction(self.text, rows.text, rows.wrong_text)
        return bce(self.d_text(rows.text), 1) + bce(self.d_text(fake), 0)

    def loss_d_image(self, rows: Rows) -> Tensor:
        """D_I: image feature -> 1, reconstruction -> 0."""
        fake = self.reconstruction(self.image, rows.image, rows.wrong_image)
        return bce(self.d_image(rows.image), 1) + bce(self.d_image(fake), 0)

    def loss_d_text_inter(self, rows: Rows) -> Tensor:
        """D_CT: (text common, text) -> 1, (image common, text) -> 0, (wrong text common, wrong text) -> 0."""
        image, text, wrong = self.commons(rows, "text")
        real = bce(self.d_text_inter(text, rows.text), 1)
        fake = bce(self.d_text_inter(image, rows.text), 0)
        return real + 0.5 * fake + 0.5 * bce(self.d_text_inter(wrong, rows.wrong_text), 0)

    def loss_d_image_inter(self, rows: Rows) -> Tensor:
        """D_CI: (image common, image) -> 1, (text common, image) -> 0, (wrong image common, wrong image) -> 0."""
        image, text, wrong = self.commons(rows, "image")
        real = bce(self.d_image_inter(image, rows.image), 1)
        fake = bce(self.d_image_inter(text, rows.image), 0)
        return real + 0.5 * fake + 0.5 * bce(self.d_image_inter(wrong, rows.wrong_image), 0)

    @torch.no_grad()
    def commons(self, rows: Rows, wrong: str) -> tuple[Tensor, Tensor, Tensor]:
        """Image, text and the wrong rows' common representation of the modality `wrong`."""
        if not self.joined:
            other = self.image(rows.wrong_image) if wrong == "image" else self.text(rows.wrong_text)
            return self.image(rows.image), self.text(rows.text), other
        image, wrong_image = self.fakes(self.image, rows.image, rows.wrong_image)
        text, wrong_text = self.fakes(self.text, rows.text, rows.wrong_text)
        return image, text, wrong_image if wrong == "image" else wrong_text

    # ------------------------------------------------------------------------------------------ generator

    def loss_image(self, rows: Rows) -> Tensor:
        """G_I: fool D_CT with the image's common representation and D_I with the reconstruction; classify."""
        common = self.image(rows.image)
        loss = bce(self.d_text_inter(common, rows.text), 1) + bce(self.d_image(self.image.decoder(common)), 1)
        return loss + F.cross_entropy(self.image.classifier(common).float(), rows.labels)

    def loss_text(self, rows: Rows) -> Tensor:
        """G_T: fool D_CI with the text's common representation and D_T with the reconstruction; classify."""
        common = self.text(rows.text)
        loss = bce(self.d_image_inter(common, rows.image), 1) + bce(self.d_text(self.text.decoder(common)), 1)
        return loss + F.cross_entropy(self.text.classifier(common).float(), rows.labels)

    # ------------------------------------------------------------------------------------------ one batch

    def phases(self) -> list[tuple[str, tuple[str, ...]]]:
        """(phase, optimisers that step) in order."""
        table: list[tuple[str, tuple[str, ...]]] = [("D_T", ("d_text",)), ("D_I", ("d_image",))]
        table += [("D_CT", ("d_text_inter",)), ("D_CI", ("d_image_inter",))]
        for _ in range(self.generator_steps):
            table += [("G_I", ("image", "text")), ("G_T", ("image", "text"))]
        return table

    def update(self, rows: Rows) -> list[tuple[str, Tensor]]:
        """One batch; (phase, loss) in order."""
        return list(self.updates(rows))

    def updates(self, rows: Rows) -> Iterator[tuple[str, Tensor]]:
        """The same, one update after another as they are asked for."""
        for phase, names in self.phases():
            generator = phase.startswith("G")
            for name in DISCRIMINATORS:
                getattr(self, name).requires_grad_(not generator)
            for name in names:
                self.optimizers[name].zero_grad()
            with torch.autocast(rows.image.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.losses[phase](rows)
            loss.backward()
            for name in names:
                self.steps[name]()
            yield phase, loss.detach()

    # ------------------------------------------------------------------------------------------ weights

    def named(self) -> dict[str, Any]:
        """Every parameter by the name of its like in cmgan_dist, MODULE/NAME."""
        out = {
            "generator/shared.linear.0.weight": self.image.shared[0].weight,
            "generator/shared.norm.0.weight": self.image.shared[1].weight,
            "generator/shared.norm.0.bias": self.image.shared[1].bias,
        }
        for head, (part, side) in enumerate((("image", self.image), ("text", self.text))):
            encoder, decoder = f"generator/{part}_encoder", f"generator/{part}_decoder"
            out[f"{encoder}.linear.weight"] = side.encoder[0].weight
            out[f"{decoder}.hidden.weight"] = side.decoder[0].weight
            for kind in ("weight", "bias"):
                out[f"{encoder}.norm.{kind}"] = getattr(side.encoder[1], kind)
                out[f"{decoder}.norm.{kind}"] = getattr(side.decoder[1], kind)
                out[f"{decoder}.out.{kind}"] = getattr(side.decoder[3], kind)
                out[f"generator/classifiers.{head}.{kind}"] = getattr(side.classifier, kind)
            inter = getattr(self, f"d_{part}_inter")
            out[f"d_{part}_inter/hidden.weight"] = inter.hidden[0].weight
            for kind in ("weight", "bias"):
                out[f"d_{part}/out.{kind}"] = getattr(getattr(self, f"d_{part}"), kind)
                out[f"d_{part}_inter/norm.{kind}"] = getattr(inter.hidden[1], kind)
                out[f"d_{part}_inter/out.{kind}"] = getattr(inter.out, kind)
        return out

    @torch.no_grad()
    def copy_from(
        self, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer] | None = None
    ) -> None:
        """Take the weights of cmgan_dist's modules ("generator" and the discriminators), and their optimisers' state.

        The modality discriminator, which the reference has not, is left out. Raises ValueError when the parameters are
        not the same ones in name and shape."""
        mine, modules = self.named(), {name: module for name, module in modules.items() if name != "d_modality"}
        given = {f"{m}/{name}": p for m, module in modules.items() for name, p in module.named_parameters()}
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in given.items()}:
            wrong = sorted(
                k for k in mine | given if k not in mine or k not in given or mine[k].shape != given[k].shape
            )
            raise ValueError(f"not the parameters of the reference step: {', '.join(wrong)}")
        theirs: dict[Tensor, Any] = {}
        for optimizer in (optimizers or {}).values():
            theirs |= optimizer.state
        owners = {p: o for o in self.optimizers.values() for group in o.param_groups for p in group["params"]}
        for name, parameter in mine.items():
            parameter.copy_(given[name])
            if given[name] in theirs:
                owners[parameter].state[parameter] = {k: v.clone() for k, v in theirs[given[name]].items()}
