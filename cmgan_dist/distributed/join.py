"""How the processes of a run are started and find each other, under accelerate, torchrun and DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json, read_bytes

log = logging.getLogger(__name__)

JOIN_S = 300.0
"""The least time, in seconds, to wait for the other processes at the start: nodes load packages at different speeds."""
REPLACED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "communication_data_type",
}
"""Keys of a DeepSpeed configuration in whose place the run's own settings count."""
USED = {
    "zero_optimization",
    "fp16",
    "bf16",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
}
"""Other keys of one; by those that are in neither DeepSpeed would train otherwise than the run's settings say, or not
heed them."""
UNUSED_IN_ZERO = ("offload_param", "zero_quantized", "zero_hpz", "mics_")
"""How keys of zero_optimization begin that ZeRO-1 and ZeRO-2 do not heed."""
REFUSED_IN_ZERO = {
    "round_robin_gradients": "with which DeepSpeed gives other parameters' moments to a checkpoint",
    "legacy_stage1": "which DeepSpeed no longer has",
    "zenflow": "which trains by another optimiser",
}
"""Other keys of zero_optimization that would spoil a run, and how."""
SET_HERE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "train.precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "train.compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "optim.accumulate"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "optim.clip"),
}
"""Variables by which accelerate hands on settings of its own -> the value of none, and the field that counts here."""
_STORE_KEY = "cmgan_dist/store"
"""Where in torchrun's store the first process leaves the address of its own."""


def start_all_processes() -> None:
    """Become a launcher of all N processes where `accelerate launch --num_processes N` has started one only.

    accelerate 1.15 starts one process without a GPU (and with --cpu), and leaves a MASTER_PORT without a RANK. What it
    was asked for stands on its command line. Return where there is nothing to do, else replace this process."""
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
    log.info("accelerate started one process: starting %d", launch.num_processes)
    per_machine = launch.num_processes // launch.num_machines
    where = ["--nnodes", str(launch.num_machines), "--node_rank", str(launch.machine_rank)]
    where += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    if launch.num_machines == 1:
        where = ["--standalone"]  # a free port: two runs on one machine do not meet
    command = [sys.executable, "-m", "cmgan_dist.distributed.launch", *where, "--nproc_per_node", str(per_machine)]
    os.environ.pop("MASTER_PORT")
    os.execv(sys.executable, [*command, *sys.argv])


def _own_address() -> str | None:
    """Return this host's IPv4 address on the way to the first node, or None where that has no such address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ.get("MASTER_ADDR", ""), 9))  # sends nothing: it only chooses the way
            return str(probe.getsockname()[0])
    except OSError:
        return None  # joining will say what is wrong


def name_gloo_interface() -> None:
    """Tell gloo, by GLOO_SOCKET_IFNAME, which network interface leads to the first node.

    Left alone gloo may announce 127.0.0.1, where no other node finds it. A value that is set already stays."""
    if "GLOO_SOCKET_IFNAME" in os.environ or not os.environ.get("MASTER_ADDR"):
        return
    own = _own_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def join_torchrun(timeout_s: float) -> None:
    """Form the process group of the processes that torchrun has started, through a store of this start alone.

    torchrun 2.14 keeps one store over all restarts, in which the addresses of processes that are gone still stand: a
    process that reads its partner's before the partner has written it anew is refused. So the first rank opens a store
    of its own and leaves its address in torchrun's; the others read that until somebody answers there. Raises OSError
    or torch's DistError where that takes longer than `timeout_s` seconds."""
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


def say_unused(precision: str) -> None:
    """Log, on the first process, which settings of accelerate are not used; `precision`: the run's own.

    Raises BadInput where accelerate asks for another way to divide the model."""
    for name in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise BadInput(
                f"accelerate asks for {name}, which is not used: train without, by train.shard_backbones=true"
            )
    for variable, (none, field) in SET_HERE.items():
        asked, what = os.environ.get(variable, none).lower(), variable.removeprefix("ACCELERATE_").lower()
        if asked not in (none, precision) and os.environ.get("RANK", "0") == "0":
            log.warning("accelerate's %s %s is not used: set %s", what, asked, field)


def take_zero_config() -> dict[str, Any] | None:
    """Return the DeepSpeed configuration that `accelerate launch` was given, or None without DeepSpeed.

    It is taken out of the environment, so that accelerate does not act on it. Raises BadInput, naming the file, where
    the configuration cannot be read or asks for another stage than ZeRO-1 or ZeRO-2."""
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") != "true":  # taken out: accelerate's own integration
        return None  # expects one engine for all that trains
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        where = f"deepspeed_config_file {path}"
        try:
            config = _without_auto(parse_json(read_bytes(path)))
            stage = config["zero_optimization"]["stage"]
            if type(stage) is not int:
                raise ValueError(f"its stage is {stage}, no whole number")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{where} cannot be used ({type(error).__name__}: {error}): give a JSON file with "
                "zero_optimization.stage, as in launchers/configs/"
            ) from None
    else:
        where, named = "deepspeed_config.zero_stage", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if not named.isdecimal():
            raise BadInput(f"{where} is '{named}': set it to 1 or 2")
        stage = int(named)
        config = {"zero_optimization": {"stage": stage}}
        device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
        if device != "none":
            config["zero_optimization"]["offload_optimizer"] = {"device": device}
    if stage == 0:
        raise BadInput(f"{where} asks for ZeRO stage 0, which is DDP: set it to 1 or 2, or train without DeepSpeed")
    if stage not in (1, 2):
        raise BadInput(
            f"{where} asks for ZeRO stage {stage}: set it to 1 or 2, or train without DeepSpeed, where "
            "train.shard_backbones=true divides trained backbones (stage 3 takes parameters apart that the losses of "
            "other modules go through)"
        )
    return _checked(config, where.removesuffix(".zero_stage"))


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration without what this project sets itself, which the log names.

    Raises BadInput where it asks for what would change the training in silence."""
    for key in sorted(map(str, config.keys() - USED - REPLACED)):
        raise BadInput(f"{where} has '{key}', which is not used here: drop it, and set optim.* or train.precision")
    for key, value in config["zero_optimization"].items():
        is_set = value is True or value not in (None, False, 1, -1, {"device": "none"})
        if str(key).startswith(UNUSED_IN_ZERO) and is_set:
            raise BadInput(f"{where} has zero_optimization.{key}, which stages 1 and 2 do not heed: drop it")
        if key in REFUSED_IN_ZERO and is_set:
            raise BadInput(f"{where} has zero_optimization.{key}, {REFUSED_IN_ZERO[key]}: drop it")
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu", None):
        raise BadInput(f"{where} offloads the optimizer to {device!r}: set offload_optimizer's device to cpu or none")
    for key in ("fp16", "bf16"):
        if not isinstance(config.get(key, {}), dict):
            raise BadInput(f"{where} has a '{key}' that is no mapping: drop it, and set train.precision")
    replaced = sorted(REPLACED & config.keys())
    if replaced:
        log.warning("%s: %s passed over: the run's own settings count", where, ", ".join(replaced))
    return {key: value for key, value in config.items() if key not in REPLACED}


def _without_auto(config: Any) -> Any:
    """Return a DeepSpeed configuration without the values "auto", which `accelerate launch` is to fill in: DeepSpeed's
    own default stands in their place, or what this project sets."""
    if not isinstance(config, dict):
        return config
    return {key: _without_auto(value) for key, value in config.items() if value != "auto"}


def reason_of(error: BaseException) -> str:
    """Return the first line of a collective's error, without gloo's place in its source and advice to programmers."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] |\. This is typically caused by .*", "", line)


def is_lost_process(error: BaseException) -> bool:
    """Return whether `error` is that of a collective whose other processes are gone, stuck or out of reach."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
