"""Processes, devices and precision: the one place that names accelerate.

Gradients of W processes with batch B equal those of one with W * B: DDP averages them, BatchNorm statistics and
gathered tensors go through `Parallel.gather_differentiable`, whose backward adds up what every process asks of a row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from cmgan_dist.kernels.shared_layer import GroupBatchNorm

log = logging.getLogger(__name__)


class _GatherRows(torch.autograd.Function):
    """[...] -> [W, ...]; backward: the sum over processes of the gradient to this process's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        world = dist.get_world_size()
        out = x.new_empty((world, *x.shape))
        dist.all_gather_into_tensor(out.view(world * x.shape[0], *x.shape[1:]), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def start_all_processes() -> None:
    """Where `accelerate launch --num_processes N` has started one process only, become a launcher of all N.

    accelerate 1.15 does so without a GPU (and with --cpu), and leaves a MASTER_PORT without a RANK. What it was asked
    for stands on its command line. Returns where there is nothing to do, else replaces this process."""
    if "MASTER_PORT" not in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ or "RANK" in os.environ:
        return
    if any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")):
        return
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    asked = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, default in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0)):
        asked.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int, default=default)
    launch, _ = asked.parse_known_args(words)
    if launch.num_processes <= 1:
        return
    log.info("accelerate started one process: starting %d by torch.distributed.run", launch.num_processes)
    per_machine = launch.num_processes // launch.num_machines
    where = ["--nnodes", str(launch.num_machines), "--node_rank", str(launch.machine_rank)]
    where += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    if launch.num_machines == 1:
        where = ["--standalone"]  # a free port: two runs on one machine do not meet
    command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", str(per_machine)]
    os.environ.pop("MASTER_PORT")
    os.execv(sys.executable, [*command, *sys.argv])


class Parallel:
    """This process among the others."""

    def __init__(self, precision: str = "fp32", tracker: str = "none", logging_dir: str | None = None) -> None:
        """`precision`: fp32 or bf16 autocast. `tracker`: tensorboard, wandb or none."""
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else accelerate may leave the processes apart
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=None if tracker == "none" else tracker,
            project_dir=logging_dir,
            kwargs_handlers=[
                # Buffers are equal everywhere by construction; an alternate generator phase reaches one side only.
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
            ],
        )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world != started:  # each would train alone and write over the others
            raise RuntimeError(f"{started} processes were started but accelerate joined {self.world}")
        self._signalled = False

    # ------------------------------------------------------------------------------------------ tensors

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move to the device and wrap in DDP where there are several processes; BatchNorms are synchronised."""
        module.to(self.device)
        if self.world == 1:
            return module
        for part in module.modules():
            if isinstance(part, GroupBatchNorm):
                part.gather = _GatherRows.apply
        if not any(p.requires_grad for p in module.parameters()):
            return module
        return self.accelerator.prepare_model(module)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def gather(self, x: Tensor) -> Tensor:
        """[B, ...] -> [W * B, ...] in rank order; no gradient. Every process must have the same B."""
        if self.world == 1:
            return x.detach()
        with torch.no_grad():
            return _GatherRows.apply(x.detach()).flatten(0, 1)

    def gather_differentiable(self, x: Tensor) -> Tensor:
        """[B, ...] -> [W * B, ...] in rank order, with the gradient of all processes."""
        return x if self.world == 1 else _GatherRows.apply(x).flatten(0, 1)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes, which must all have the same keys."""
        if self.world == 1 or not values:
            return values
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return dict(zip(values, (summed / self.world).tolist(), strict=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """A picklable value of every process, in rank order."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------ signals

    def watch_signals(self) -> None:
        """SIGTERM, SIGUSR1 and Ctrl-C set a flag, which `stop_requested` reads at a step's end: work in a handler
        stalls. A second Ctrl-C interrupts at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            self._signalled = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, handler)

    def stop_requested(self) -> bool:
        """Whether any process was signalled; all get the same answer."""
        if self.world == 1:
            return self._signalled
        flag = torch.tensor(int(self._signalled), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    # ------------------------------------------------------------------------------------------ tracking and end

    def start_trackers(self, name: str, config: dict[str, Any]) -> None:
        self.accelerator.init_trackers(name, config=config)

    def track(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """End trackers and the process group. Drop wrapped modules first: a group that ends under a living DDP module
        can abort."""
        self.accelerator.end_training()
        self.accelerator.free_memory()
        gc.collect()
        if self.world > 1 and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()
