"""How trained backbones whose parameters do not fit are divided among the processes; the one file that names FSDP2.

`fully_shard` (Zhao et al., VLDB 2023) divides a backbone block by block: a process holds its share of each parameter,
gradient and moment, and has a block whole only while the block runs. The small adversarial networks stay whole, under
DDP. Sharded parameters are torch's DTensors; the optimiser sees this process's share of them, in the same memory, so
that one fused AdamW steps both kinds.

A forward pass of a sharded backbone is a collective. In training every process makes the same ones; in evaluation
processes may have unequal numbers of batches, and `Turns` lets those without one run along.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cmgan_dist.distributed.engine import MOMENTS, Engine

_OF_BACKBONE = r"FSDP2-wrapped module \(FSDP\w*(Backbone|Encoder|CNN)\) returned a view"
warnings.filterwarnings("ignore", _OF_BACKBONE, UserWarning)  # nothing writes into a backbone's features

LARGEST, SMALLEST = 0.25, 0.01
"""What a block has at most and at least of a backbone's parameters: larger ones are looked into for blocks of their
own, smaller ones are gathered with the backbone's rest."""


def blocks_of(module: nn.Module, total: int, listed: bool = False) -> list[nn.Module]:
    """Return the blocks that are gathered one at a time: modules that stand in a list or sequence, such as the layers
    of a transformer. `total`: elements of all parameters; `listed`: whether `module` itself stands in one."""
    many = isinstance(module, nn.ModuleList | nn.Sequential)  # these may be gone through without being called
    block, share = listed and not many, sum(p.numel() for p in module.parameters()) / total
    if block and SMALLEST <= share <= LARGEST:
        return [module]
    inside = [found for child in module.children() for found in blocks_of(child, total, many)]
    return inside or [module] * (block and share > LARGEST)


def shard(backbone: nn.Module, device: torch.device, reduce_precision: str) -> None:
    """Divide the parameters of a backbone among all processes, and move it to the device.

    `reduce_precision`: fp32 or bf16, in which gradients travel."""
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce_precision == "bf16" else None),
        "reshard_after_forward": True,  # the backbone's rest too: the no-grad forward has no backward to end it
    }
    for block in blocks_of(backbone, sum(p.numel() for p in backbone.parameters())):
        fully_shard(block, **options)
    fully_shard(backbone, **options)


def sharded_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are sharded."""
    return [name for name, p in module.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)]


def whole_tensors(tensors: Mapping[str, Tensor], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield those of `tensors` that are in `names`, by name; sharded ones whole, on the CPU.

    One is gathered at a time: every process goes through all of it with the same tensors, whatever its names are."""
    for name, tensor in tensors.items():
        found = tensor.detach()
        if isinstance(found, DTensor):
            found = found.full_tensor()
            found = found.cpu() if name in names else found
        if name in names:
            yield name, found


def share_of_tensor(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, the same on every process, divided as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], strict: bool) -> None:
    """Load whole tensors by name into a module that may have sharded parameters; `strict`: as in load_state_dict."""
    held = module.state_dict()
    module.load_state_dict({k: share_of_tensor(v, held.get(k, v)) for k, v in tensors.items()}, strict=strict)


class Turns:
    """Who runs a sharded backbone next in evaluation: one that any process waits for, and all processes run it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.backbones: list[tuple[nn.Module, Any]] = []
        self._along = False

    def add(self, backbone: nn.Module, probe: Any) -> None:
        """Let a sharded backbone take turns; `probe`: an input of one row, for processes that have none."""
        hook = partial(self._wait, len(self.backbones))
        self.backbones.append((backbone, probe))
        backbone.register_forward_pre_hook(hook, prepend=True)  # before FSDP's own, which gathers

    def _wait(self, number: int, backbone: nn.Module, _: Any) -> None:
        if not backbone.training and not self._along:
            while (turn := self._agree(number)) != number:
                self._run_along(turn)

    def _agree(self, wanted: int) -> int:
        """Return the lowest number of a backbone that any process wants to run."""
        turn = torch.tensor(wanted, device=self.device)
        dist.all_reduce(turn, op=dist.ReduceOp.MIN)
        return int(turn)

    def _run_along(self, number: int) -> None:
        backbone, probe = self.backbones[number]
        self._along = True
        backbone(probe)
        self._along = False

    def finish(self) -> None:
        """Run along until no process has anything left to run. Every process calls it once it is done."""
        none = len(self.backbones)
        while none and (turn := self._agree(none)) != none:
            self._run_along(turn)


class ShardedEngine(Engine):
    """An engine whose module has sharded parameters, beside whole ones under DDP."""

    def _build(self) -> None:
        self.sharded = {name: p for name, p in self.named_parameters.items() if isinstance(p, DTensor)}
        with torch.no_grad():
            self.updated |= {name: nn.Parameter(p.to_local()) for name, p in self.sharded.items()}
        self._shares = {id(self.updated[name]) for name in self.sharded}
        super()._build()

    def zero_grad(self) -> None:
        """Forget the gradients of the update before."""
        super().zero_grad()
        for parameter in self.sharded.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, loss: Tensor, measure: bool) -> dict[str, Tensor]:
        """Update the parameters as `Engine.step` does; what a share alone cannot tell is asked of all processes."""
        for name, parameter in self.sharded.items():
            grad = parameter.grad
            self.updated[name].grad = grad.to_local() if isinstance(grad, DTensor) else None
        return super().step(loss, measure)

    def _anywhere(self, flag: Tensor) -> Tensor:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def _gradient_norm(self) -> Tensor:
        grads: dict[bool, list[Tensor]] = {False: [], True: []}
        for parameter in self.updated.values():
            if parameter.grad is not None:
                grads[id(parameter) in self._shares].append(parameter.grad)
        own, shares = (nn.utils.get_total_norm(grads[sharded]).to(self.device).square() for sharded in (False, True))
        dist.all_reduce(shares)
        return (own + shares).sqrt()

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's state in the form of `Engine.state`, moments sharded as their parameters are."""
        out = super().state()
        for name, p in self.sharded.items():
            for key in (f"{name}/{moment}" for moment in MOMENTS):
                if key in out:
                    out[key] = DTensor.from_local(
                        out[key], p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
                    )
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of an engine of the same module returned, whole."""
        shares = dict(state)
        for name, parameter in self.sharded.items():
            for key in (f"{name}/{moment}" for moment in MOMENTS):
                if key in state:
                    share = share_of_tensor(state[key], parameter)
                    assert isinstance(share, DTensor)
                    shares[key] = share.to_local()
        super().load(shares)
