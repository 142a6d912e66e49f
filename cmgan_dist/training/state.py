"""What a run trains: its networks, the engines that train them, and all their tensors for a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmgan_dist.config.fields import Config
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.distributed.engine import AdamSettings, Engine
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.distributed.shard import load_tensors
from cmgan_dist.models.discriminators import NAMES, build_discriminators
from cmgan_dist.models.generator import Generator, SingleModalityGenerator, build_generator
from cmgan_dist.models.saved import check_shapes, stored_tensors
from cmgan_dist.models.vocabulary import Vocabulary


@dataclass
class Networks:
    """The modules of a run and the engines that train them."""

    generator: Generator
    unwrapped: dict[str, nn.Module]
    """The discriminators by name, without DDP or DeepSpeed around them."""
    engines: dict[str, Engine]
    """What trains each module, by name: "generator" and the discriminators' names."""
    average: Generator | None
    """The exponential moving average of the generator, or None without `train.ema`."""
    multi_label: bool
    """Whether a sample of the data may have several classes, which decides on the classification loss."""

    kept: list[Tensor] = field(default_factory=list)
    """The running statistics before the batch that is under way."""

    @property
    def eval_generator(self) -> Generator:
        """The generator that is validated and kept: the average where there is one."""
        return self.average or self.generator

    def keep_buffers(self) -> None:
        """Remember the running statistics as they are before a batch; `restore_buffers` brings them back."""
        live = self._buffers()
        if not self.kept:
            self.kept = [buffer.clone() for buffer in live]
        torch._foreach_copy_(self.kept, live)

    def restore_buffers(self) -> None:
        """Undo what the batch since `keep_buffers` did to the running statistics."""
        torch._foreach_copy_(self._buffers(), self.kept)

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self.parts().values() for buffer in module.buffers()]

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules that a checkpoint holds, by the prefix of their tensors."""
        parts: dict[str, nn.Module] = {"generator": self.generator, **self.unwrapped}
        return parts if self.average is None else {**parts, "ema": self.average}

    def model_tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers of all modules by name, without the generator's frozen backbones."""
        out: dict[str, Tensor] = {}
        for name, module in self.parts().items():
            state = stored_tensors(module) if isinstance(module, Generator) else module.state_dict()
            out |= {f"{name}/{k}": v for k, v in state.items()}
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint holds, the optimisers' too; every process calls it, as ZeRO gathers.

        Those of sharded backbones are sharded still (`shard.whole_tensors`)."""
        out = self.model_tensors()
        for name, engine in self.engines.items():
            out |= {f"optimizer/{name}/{k}": v for k, v in engine.state().items()}
        return out

    def set_rates(self, factor: float) -> None:
        """Set all learning rates to `factor` times those in the config."""
        for engine in self.engines.values():
            engine.set_rate(factor)

    def release(self) -> None:
        """Drop the wrapped modules, none of which may outlive the process group."""
        for engine in self.engines.values():
            engine.release()

    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take over the tensors of a checkpoint; `where` names it in errors.

        Raises BadInput when it is the checkpoint of another model."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        tensors = self._with_average(tensors)
        check_shapes(self.model_tensors(), {k: v for k, v in tensors.items() if not k.startswith("optimizer/")}, where)
        for name, module in self.parts().items():
            load_tensors(module, under(f"{name}/"), strict=not isinstance(module, Generator))
        for name, engine in self.engines.items():
            engine.load(under(f"optimizer/{name}/"))

    def _with_average(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors as of a run with `train.ema` as it is now: an average that begins here begins
        with the generator, and one that ends here is left out."""
        if self.average is None:
            return {k: v for k, v in tensors.items() if not k.startswith("ema/")}
        of_generator = {k: v for k, v in tensors.items() if k.startswith("generator/")}
        return {k.replace("generator/", "ema/", 1): v for k, v in of_generator.items()} | tensors


def build_networks(config: Config, spec: DataSpec, vocabulary: Vocabulary | None, parallel: Parallel) -> Networks:
    """Return the networks of a config for data of the kind `spec`, on the device, with their engines.

    `vocabulary` is for the text CNN. Every process starts with the same weights, by `train.seed`. Raises BadInput where
    config and data do not fit together."""
    torch.manual_seed(config.train.seed)  # the same initial weights on every process
    generator = build_generator(config.model, spec, vocabulary)
    dims = (generator.image_backbone.dim, generator.text_backbone.dim)
    unwrapped = dict(build_discriminators(config.model, *dims, len(spec.classes)).items())
    if not config.loss.intra:  # parts that no loss reaches have no optimiser state either
        generator.image_decoder.requires_grad_(False)
        generator.text_decoder.requires_grad_(False)
    if not config.loss.classification:
        generator.classifiers.requires_grad_(False)
    average = copy.deepcopy(generator).requires_grad_(False) if config.train.ema else None
    if config.train.shard_backbones:
        for each in [generator, average] if average else [generator]:
            _shard_backbones(each, config, parallel)
    if average is not None:
        average.to(parallel.device)
    if config.train.compile:
        for module in (generator, *unwrapped.values()):
            module.compile()
    optim = config.optim

    def settings(lr: float, beta1: float, decay: float = 0.0) -> AdamSettings:
        return AdamSettings(lr, beta1, optim.beta2, decay, optim.clip, fp16=config.train.precision == "fp16")

    of_generator = settings(optim.generator_lr, optim.generator_beta1, optim.weight_decay)
    of_discriminators = settings(optim.discriminator_lr, optim.discriminator_beta1)
    parts: dict[str, nn.Module] | None = None
    if optim.update == "alternate":
        parts = {
            "image": SingleModalityGenerator(generator, "image"),
            "text": SingleModalityGenerator(generator, "text"),
        }
    engines = {"generator": parallel.engine(generator, of_generator, parts)}
    engines |= {name: parallel.engine(unwrapped[name], of_discriminators) for name in NAMES}
    return Networks(generator, unwrapped, engines, average, multi_label=spec.label_kind == "multi")


def _shard_backbones(generator: Generator, config: Config, parallel: Parallel) -> None:
    size = config.model.image.image_size
    if generator.image_backbone.trainable:
        parallel.shard(generator.image_backbone, torch.zeros(1, 3, size, size, device=parallel.device))
    if generator.text_backbone.trainable:
        parallel.shard(generator.text_backbone, generator.text_backbone.tokenise(["a"], parallel.device))


def update_average(average: Generator, generator: Generator, decay: float) -> None:
    """Set `average` to decay * average + (1 - decay) * generator, parameters and running statistics."""
    with torch.no_grad():
        now = stored_tensors(generator)
        for name, value in stored_tensors(average).items():
            if value.is_floating_point():
                value.lerp_(now[name], 1 - decay)
