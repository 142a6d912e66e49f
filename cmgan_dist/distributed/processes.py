"""What a process knows of the others: its rank, device and precision, and the collectives that training calls.

This is the one file that names accelerate, as zero.py is the one that names deepspeed, and shard.py FSDP2. Gradients of
W processes with batch B equal those of one with W * B: DDP averages them, BatchNorm statistics are sums over all
(`sync_norm`), and gathered tensors go through `Parallel.gather_differentiable`, whose backward adds up what every
process asks of a row.

Shapes: W processes, B rows a process.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from cmgan_dist.distributed.alone import await_work, working
from cmgan_dist.distributed.engine import AdamSettings, Engine
from cmgan_dist.distributed.join import (
    JOIN_S,
    is_lost_process,
    join_torchrun,
    name_gloo_interface,
    reason_of,
    say_unused,
    take_zero_config,
)
from cmgan_dist.distributed.precision import autocast
from cmgan_dist.distributed.shard import ShardedEngine, Turns, shard, sharded_names
from cmgan_dist.distributed.sync_norm import synchronise_statistics
from cmgan_dist.errors import BadInput, LostProcess
from cmgan_dist.jobs import startup
from cmgan_dist.jobs.memory import keep_freed_memory

log = logging.getLogger(__name__)
T = TypeVar("T")
BEAT_S = 2.0
"""Seconds after which the first process tells the others again that it works alone (`on_main`)."""


class _GatherRows(torch.autograd.Function):
    """Gather x [B, ...] of every process into [W, B, ...].

    Backward gives this process's part of the gradient, summed over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        world = dist.get_world_size()
        out = x.new_empty((world, *x.shape))
        dist.all_gather_single(out.view(world * x.shape[0], *x.shape[1:]), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        own = torch.empty_like(grad[0])
        dist.reduce_scatter_single(own, grad.flatten(0, 1))
        return own


class Parallel:
    """This process among the others: where it stands (`rank` of `world`, `device`) and how it talks to them."""

    def __init__(
        self,
        precision: str = "fp32",
        tracker: str = "none",
        logging_dir: str | None = None,
        timeout_s: float = 600.0,
        reduce_precision: str = "fp32",
    ) -> None:
        """Join the other processes that a launcher has started; without a launcher this process is alone.

        `precision`: fp32, or autocast to bf16 or fp16. `tracker`: tensorboard, wandb or none, which writes to
        `logging_dir`. `timeout_s`: seconds that a collective waits for the other processes before it fails.
        `reduce_precision`: fp32 or bf16, in which gradients travel. Raises LostProcess where the others cannot be
        reached, and BadInput for a DeepSpeed configuration that is not supported."""
        self.zero_config = take_zero_config()
        """DeepSpeed's configuration, or None where plain torch trains."""
        say_unused(precision)
        name_gloo_interface()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        joining = InitProcessGroupKwargs(timeout=timedelta(seconds=max(timeout_s, JOIN_S)))
        try:
            if started > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                join_torchrun(max(timeout_s, JOIN_S))
            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),  # else accelerate may leave the processes apart
                mixed_precision="no",  # its autocast and its one loss scaler are not used
                log_with=None if tracker == "none" else tracker,
                project_dir=logging_dir,
                kwargs_handlers=[joining],
            )
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and not is_lost_process(error):
                raise
            raise LostProcess(
                f"process {os.environ.get('RANK', '0')} could not join the others ({reason_of(error)}): look "
                "into their logs; where their network interface is wrong, set GLOO_SOCKET_IFNAME"
            ) from error
        self._timeout = timedelta(seconds=timeout_s)
        if dist.is_initialized():
            dist.set_timeout(self._timeout)
        self.precision, self.reduce_precision = precision, reduce_precision
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.world != started:  # each would train alone and write over the others
            raise RuntimeError(f"{started} processes were started but accelerate joined {self.world}")
        self._signalled = False
        self._beat_s = min(BEAT_S, timeout_s / 4)
        self._alone: dist.ProcessGroup | None = None  # made by the first `on_main`
        self._turns = Turns(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed ZeRO trains the modules, and not plain torch."""
        return self.zero_config is not None

    @property
    def kind(self) -> str:
        """How the processes share the work, in words for the log; "" for one process alone."""
        if self.zero_config is not None:
            return f"DeepSpeed ZeRO-{self.zero_config['zero_optimization']['stage']}"
        sharded = ", backbones sharded by FSDP2" if self._turns.backbones else ""
        return f"DDP{sharded}" if self.world > 1 else ""

    def shard(self, backbone: nn.Module, probe: Any) -> None:
        """Divide a trained backbone's parameters among the processes, before `engine`; nothing with one process alone.

        `probe`: an input of one row. Raises BadInput under DeepSpeed."""
        if self.zero_config is not None:
            raise BadInput(
                "train.shard_backbones is on, and DeepSpeed trains: leave DeepSpeed out (--config_file), or set it to "
                "false",
                everywhere=True,
            )
        if self.world > 1:
            shard(backbone, self.device, self.reduce_precision)
            self._turns.add(backbone, probe)

    def finish_forwards(self) -> None:
        """Run sharded backbones along with processes that have more to evaluate than this one; every process calls it,
        with its generator in eval mode, once it has evaluated what is its own."""
        self._turns.finish()

    def engine(self, module: nn.Module, settings: AdamSettings, parts: dict[str, nn.Module] | None = None) -> Engine:
        """Move `module` to the device, synchronise its BatchNorms and return the engine that trains it.

        `parts`: modules that losses call in its place, by name, each of which has the parameters that get a gradient
        then; a parameter may be in several. Raises BadInput for a DeepSpeed configuration that asks for what is not
        used."""
        parts = parts or {"": module}
        module.to(self.device)
        if self.world > 1:
            synchronise_statistics(module)
        if self.zero_config is not None:
            from cmgan_dist.distributed.zero import ZeroEngine  # seconds to import, and only here

            config = self.zero_config | {"communication_data_type": self.reduce_precision}
            engine = ZeroEngine(module, parts, settings, self.device, config)
            dist.set_timeout(self._timeout, engine.process_group)  # DeepSpeed's own, which would wait half an hour
            return engine
        kind = ShardedEngine if sharded_names(module) else Engine
        return kind(module, {name: self._wrap(part) for name, part in parts.items()}, settings, self.device)

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sharded_names(module))
        wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,  # equal everywhere by construction
            gradient_as_bucket_view=True,
        )
        if self.reduce_precision == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def new_group(self) -> dist.ProcessGroup | None:
        """Return a new process group of all processes for CPU tensors, or None when this process is alone."""
        if self.world == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=max(self._timeout, timedelta(seconds=JOIN_S)))
        assert isinstance(group, dist.ProcessGroup)
        dist.set_timeout(self._timeout, group)
        return group

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes run: torch.autocast to `precision`, or nothing in fp32."""
        return autocast(self.device, self.precision)

    def gather(self, x: Tensor) -> Tensor:
        """Gather x [B, ...] of every process into [W * B, ...] in rank order, without a gradient.

        Every process must have the same B."""
        if self.world == 1:
            return x.detach()
        with torch.no_grad():
            return _GatherRows.apply(x.detach()).flatten(0, 1)

    def gather_differentiable(self, x: Tensor) -> Tensor:
        """Gather x [B, ...] of every process into [W * B, ...] in rank order, with the gradient of all processes."""
        return x if self.world == 1 else _GatherRows.apply(x).flatten(0, 1)

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Fetch rows of the global batch [W * B, ...], of which this process has `x` [B, ...], without a gradient.

        `index`: int64 [B], the rows that this process wants; returned are these rows, [B, ...]. Only they travel, and
        all indices: unlike with a gather, what a process sends hardly grows with W."""
        x = x.detach()
        if self.world == 1:
            return x[index.to(x.device)]
        size = len(x)
        wanted = self.gather(index.to(x.device)).view(self.world, size).cpu()  # [process that asks, B]
        owner = wanted // size
        sent = (owner == self.rank).nonzero()  # in the order of the processes that ask
        give = wanted[sent[:, 0], sent[:, 1]] - self.rank * size
        order = owner[self.rank].argsort(stable=True)  # what comes is in the order of its owners
        got = torch.empty_like(x)
        come, go = (torch.bincount(of, minlength=self.world).tolist() for of in (owner[self.rank], sent[:, 0]))
        dist.all_to_all_single(got, x[give.to(x.device)], come, go)
        return torch.empty_like(x).index_copy_(0, order.to(x.device), got)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean of each value over the processes, which must all have the same keys."""
        if self.world == 1 or not values:
            return values
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return dict(zip(values, (summed / self.world).tolist(), strict=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every process, in rank order."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def on_main(self, work: Callable[[], T]) -> T:
        """Return what `work` returns on the first process, on every process; its BadInput or OSError is raised on all.

        The others wait as long as the first one is at it, which may be longer than a collective waits. What it returns
        must pickle."""
        outcome: T | BadInput | OSError | None = None
        if self._alone is None:
            self._alone = self.new_group()
        group = self._alone
        if self.main:
            with working(group, self._beat_s) if group is not None else contextlib.nullcontext():
                try:
                    outcome = work()
                except BadInput as error:
                    error.everywhere = True
                    outcome = error
                except OSError as error:
                    outcome = error
        elif group is not None:
            await_work(group)
        outcome = self.gather_objects(outcome)[0]
        if isinstance(outcome, BadInput | OSError):
            raise outcome
        return outcome

    def memory(self) -> float:
        """Return the most memory, in GiB, that was held so far: on the GPU, or by this process without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.accelerator.wait_for_everyone()

    def watch_signals(self) -> None:
        """Let SIGTERM, SIGUSR1 and Ctrl-C set a flag, which `any_process` reads at a step's end.

        Nothing else is done in the handler, where work may stall. A second Ctrl-C interrupts at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            self._signalled = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in startup.NUMBERS:
            signal.signal(number, handler)
        startup.settled()

    def any_process(self, flags: Tensor) -> tuple[bool, list[bool]]:
        """Return whether any process was signalled, and which of `flags` (bool [n]) is set on any process.

        All processes get the same answer. It takes one collective, and is the one time in a step that the device is
        waited for."""
        every = torch.cat([torch.tensor([self._signalled], device=flags.device), flags]).to(torch.int32)
        if self.world > 1:
            dist.all_reduce(every, op=dist.ReduceOp.MAX)
        stop, *rest = every.tolist()
        return bool(stop), [bool(f) for f in rest]

    def start_trackers(self, name: str, config: dict[str, Any]) -> None:
        """Start the tracker, if any, for a project `name` with the settings `config`."""
        self.accelerator.init_trackers(name, config=config)

    def track(self, values: dict[str, float], step: int) -> None:
        """Give values by name to the tracker, if any, as those of `step`."""
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """End trackers and the process group.

        Wrapped modules must be dropped before (`Engine.release`): a group that ends under a living DDP module can
        abort."""
        self.accelerator.end_training()
        self.accelerator.free_memory()
        gc.collect()
        if self.world > 1 and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()
