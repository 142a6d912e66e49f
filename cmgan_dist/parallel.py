"""Processes, devices and precision: the one place that names accelerate; zero.py is the one that names deepspeed.

Gradients of W processes with batch B equal those of one with W * B: DDP averages them, BatchNorm statistics are sums
over all (`kernels.collective`), and gathered tensors go through `Parallel.gather_differentiable`, whose backward adds
up what every process asks of a row.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
import types
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cmgan_dist.engine import AdamSettings, Engine
from cmgan_dist.errors import BadInput, LostProcess
from cmgan_dist.kernels.shared_layer import GroupBatchNorm, group_batch_norm

log = logging.getLogger(__name__)
JOIN_S = 300.0
"""Least time to wait for the others at the start: nodes do not load their packages equally fast."""
_STORE_KEY = "cmgan_dist/store"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


class _GatherRows(torch.autograd.Function):
    """[...] -> [W, ...]; backward: the sum over processes of the gradient to this process's part."""

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


def _synchronised_forward(self: _BatchNorm, x: Tensor) -> Tensor:
    """A backbone's BatchNorm over the rows of all processes: torch's own SyncBatchNorm needs a GPU."""
    if not self.training:
        return type(self).forward(self, x)
    running = None
    if self.running_mean is not None and self.running_var is not None:
        running = [(self.running_mean, self.running_var)]
    if self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
    momentum = 1 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
    rows = x.movedim(1, -1)
    flat = rows.reshape(-1, x.shape[1])
    made = group_batch_norm(
        flat,
        [len(flat)],
        self.weight,
        self.bias,
        running,
        training=True,
        momentum=momentum,
        eps=self.eps,
        synchronised=True,
    )
    made = made.view(rows.shape).movedim(-1, 1)
    if hasattr(self, "act"):  # timm's BatchNormAct2d: dropout and activation in the same module
        made = self.act(self.drop(made))  # type: ignore[operator]
    return made


def _synchronise_statistics(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, GroupBatchNorm):
            part.synchronised = True
        elif isinstance(part, _BatchNorm):
            part.forward = types.MethodType(_synchronised_forward, part)  # type: ignore[method-assign]


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of handing it back: each step frees and takes the same gradients, and a
    page fault for each 4 KiB of them took a quarter of a step on a CPU (bench/step.py)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc has it, musl has not
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _own_address() -> str | None:
    """This host's IPv4 address on the way to the first node; None where that has no such address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ.get("MASTER_ADDR", ""), 9))  # sends nothing: it only chooses the way
            return str(probe.getsockname()[0])
    except OSError:
        return None  # joining will say what is wrong


def _name_interface() -> None:
    """Tell gloo the network interface that leads to the first node: left alone it may announce 127.0.0.1."""
    if "GLOO_SOCKET_IFNAME" in os.environ or not os.environ.get("MASTER_ADDR"):
        return
    own = _own_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _join_elastic(timeout_s: float) -> None:
    """Join the processes that torchrun has started, through a store of this start alone.

    torchrun 2.14 keeps one store over all restarts, in which the addresses of processes that are gone still stand: a
    process that reads its partner's before the partner has written it anew is refused. So the first rank opens a store
    of its own and leaves its address in torchrun's; the others read that until somebody answers there."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agents = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=timeout_s)
    )
    if rank == 0:
        host = _own_address() or os.environ["MASTER_ADDR"]
        store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        agents.set(_STORE_KEY, f"{host} {store.port}")
    else:
        deadline = time.monotonic() + timeout_s
        while True:
            host, port = agents.get(_STORE_KEY).decode().split()
            try:
                with socket.create_connection((host, int(port)), timeout=5):
                    break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        store = dist.TCPStore(host, int(port), wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))


def _zero_config() -> dict[str, Any] | None:
    """The DeepSpeed configuration that `accelerate launch` was given, or None without DeepSpeed.

    Raises BadInput naming the file."""
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") != "true":  # taken out: accelerate's own integration
        return None  # expects one engine for all that trains
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
            stage = int(config["zero_optimization"]["stage"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"deepspeed_config_file {path} cannot be used ({type(error).__name__}: {error}): give a JSON file with "
                "zero_optimization.stage, as in launchers/configs/"
            ) from None
    else:
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        config = {"zero_optimization": {"stage": stage}}
        device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
        if device != "none":
            config["zero_optimization"]["offload_optimizer"] = {"device": device}
    if stage not in (1, 2):
        raise BadInput(
            f"DeepSpeed ZeRO stage {stage} is not supported: the generator's losses go through modules of other "
            "engines, whose parameters stage 3 takes apart; use stage 1 or 2, or DDP without DeepSpeed"
        )
    return config


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, stuck or out of reach."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Parallel:
    """This process among the others."""

    def __init__(
        self,
        precision: str = "fp32",
        tracker: str = "none",
        logging_dir: str | None = None,
        timeout_s: float = 600.0,
        reduce_precision: str = "fp32",
    ) -> None:
        """`precision`: fp32, or autocast to bf16 or fp16. `tracker`: tensorboard, wandb or none. `reduce_precision`:
        fp32 or bf16, in what gradients travel.

        `timeout_s`: how long a collective waits for the other processes before it fails."""
        self._zero = _zero_config()
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked != "no" and asked != precision:
            log.warning("accelerate's --mixed_precision %s is not used: train.precision is %s", asked, precision)
        _name_interface()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        joining = InitProcessGroupKwargs(timeout=timedelta(seconds=max(timeout_s, JOIN_S)))
        try:
            if started > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                _join_elastic(max(timeout_s, JOIN_S))
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
                f"process {os.environ.get('RANK', '0')} could not join the others ({str(error).splitlines()[0]}): look "
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
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self._zero is not None

    @property
    def kind(self) -> str:
        """How the processes share the work, for the log; "" for one alone."""
        if self._zero is not None:
            return f"DeepSpeed ZeRO-{self._zero['zero_optimization']['stage']}"
        return "DDP" if self.world > 1 else ""

    def engine(self, module: nn.Module, settings: AdamSettings, parts: dict[str, nn.Module] | None = None) -> Engine:
        """What trains `module`, moved to the device; BatchNorms are synchronised.

        `parts`: modules that losses call in its place, each of which has the parameters that get a gradient then; a
        parameter may be in several. Raises BadInput for parts under ZeRO, which would count what has no gradient as
        zero."""
        parts = parts or {"": module}
        module.to(self.device)
        if self.world > 1:
            _synchronise_statistics(module)
        if self._zero is not None:
            from cmgan_dist.zero import ZeroEngine  # seconds to import, and only here

            config = {"communication_data_type": self.reduce_precision} | self._zero
            return ZeroEngine(module, parts, settings, self.device, config)
        return Engine(module, {name: self._wrap(part) for name, part in parts.items()}, settings, self.device)

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
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
        """A group of all processes over CPU tensors; None when this process is alone."""
        if self.world == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=max(self._timeout, timedelta(seconds=JOIN_S)))
        assert isinstance(group, dist.ProcessGroup)
        dist.set_timeout(self._timeout, group)
        return group

    # ------------------------------------------------------------------------------------------ tensors

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def gather(self, x: Tensor) -> Tensor:
        """[B, ...] -> [W * B, ...] in rank order; no gradient. Every process must have the same B."""
        if self.world == 1:
            return x.detach()
        with torch.no_grad():
            return _GatherRows.apply(x.detach()).flatten(0, 1)

    def gather_differentiable(self, x: Tensor) -> Tensor:
        """[B, ...] -> [W * B, ...] in rank order, with the gradient of all processes."""
        return x if self.world == 1 else _GatherRows.apply(x).flatten(0, 1)

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of the global batch [W * B, ...], of which this process has `x` [B, ...]; no gradient.

        `index`: int64 [B], the rows that this process wants. Only those travel, and all indices: unlike a gather, what
        a process sends hardly grows with W."""
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

    def memory(self) -> float:
        """Most GiB held so far: on the GPU, or of this process without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------ signals

    def watch_signals(self) -> None:
        """SIGTERM, SIGUSR1 and Ctrl-C set a flag, which `any_process` reads at a step's end: work in a handler
        stalls. A second Ctrl-C interrupts at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            self._signalled = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, handler)

    def any_process(self, flags: Tensor) -> tuple[bool, list[bool]]:
        """Whether any process was signalled, and which of the flags (bool [n]) is set on any; all get the same answer.

        One collective, and the one time in a step that the device is waited for."""
        every = torch.cat([torch.tensor([self._signalled], device=flags.device), flags]).to(torch.int32)
        if self.world > 1:
            dist.all_reduce(every, op=dist.ReduceOp.MAX)
        stop, *rest = every.tolist()
        return bool(stop), [bool(f) for f in rest]

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
