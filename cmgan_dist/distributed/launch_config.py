"""What accelerate's configuration file says, where another launcher than accelerate's starts the processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmgan_dist.config.safe_yaml import parse_yaml, read_text
from cmgan_dist.errors import BadInput

CONFIG_FLAG = "--config_file"
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")
"""Values of distributed_type that ask for DDP."""
OF_LAUNCHER = {
    "compute_environment",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "rdzv_backend",
    "same_network",
}
"""Keys that say how processes are started, which the options of the other launcher say."""
PASSED_OVER = {"offload_param_device", "deepspeed_multinode_launcher", "zero3_init_flag", "zero3_save_16bit_model"}
"""Keys of deepspeed_config that accelerate writes and that say nothing for ZeRO-1 and ZeRO-2."""
VARIABLES = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
}
"""Keys of deepspeed_config, and the variables by which accelerate hands them on."""
UNSET: tuple[object, ...] = (None, False, "no", "NO", "all", {}, [])
"""Values that accelerate writes for what is not asked for."""


def launch_config(path: str, flag: str = CONFIG_FLAG) -> dict[str, Any]:
    """Return the mapping that an accelerate configuration file holds; `flag` is what named it.

    Raises BadInput naming the file, and the key that would be lost without a word."""
    where = f"{flag} {path}"
    config = parse_yaml(read_text(Path(path), where), where)
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise BadInput(f"{where} has no distributed_type: see launchers/configs/")
    kind, fields = config["distributed_type"], config.get("deepspeed_config") or {}
    if kind == "FSDP":
        raise BadInput(f"{where} asks for FSDP: train without it, by train.shard_backbones=true")
    if kind not in (*PLAIN, "DEEPSPEED"):
        raise BadInput(
            f"{where} has distributed_type {kind}: set it to DEEPSPEED or MULTI_GPU (see launchers/configs/)"
        )
    if not isinstance(fields, dict):
        raise BadInput(f"{where} has a deepspeed_config that is no mapping: see launchers/configs/")
    if fields and kind != "DEEPSPEED":
        raise BadInput(
            f"{where} has a deepspeed_config, and distributed_type {kind}: set that to DEEPSPEED, or drop it"
        )
    used = OF_LAUNCHER | {"distributed_type", "deepspeed_config", "mixed_precision", "dynamo_config", "use_cpu"}
    other = sorted(str(key) for key in config.keys() - used if config[key] not in UNSET)
    other += sorted(f"deepspeed_config.{key}" for key in fields.keys() - VARIABLES.keys() - PASSED_OVER)
    if other:
        raise BadInput(f"{where} has {other[0]}, which is not used: drop it (see launchers/configs/)")
    return config


def launch_environment(path: str | None, flag: str = CONFIG_FLAG) -> dict[str, str]:
    """Return `environment_of` a configuration file, {} for no file. Raises as `launch_config`."""
    return {} if path is None else environment_of(launch_config(path, flag))


def environment_of(config: dict[str, Any]) -> dict[str, str]:
    """Return the variables by which `accelerate launch` tells its processes what a configuration asks for: whether
    DeepSpeed trains, on a CPU or not, and what the processes log that they do not use."""
    dynamo = config.get("dynamo_config") or {}
    backend = (dynamo.get("dynamo_backend") or dynamo.get("backend")) if isinstance(dynamo, dict) else dynamo
    asked = {"MIXED_PRECISION": config.get("mixed_precision"), "DYNAMO_BACKEND": backend}
    if config.get("use_cpu") not in UNSET:
        asked["USE_CPU"] = "true"
    out = {f"ACCELERATE_{name}": str(value) for name, value in asked.items() if value not in UNSET}
    if config["distributed_type"] != "DEEPSPEED":
        return out
    fields = config.get("deepspeed_config") or {}
    chosen = {VARIABLES[key]: str(fields[key]) for key in VARIABLES if fields.get(key) is not None}
    return {"ACCELERATE_USE_DEEPSPEED": "true", **out, **chosen}
