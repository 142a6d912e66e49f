"""Ray: started here or joined."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput

log = logging.getLogger(__name__)

OBJECT_STORE = 100 * 2**20
"""Bytes; the search keeps nothing there."""
NODES_WITHIN_S = 180.0
ROOT = Path(__file__).resolve().parents[2]
"""Where the project's packages lie: workers import them from there, installed or not."""


def start_ray(address: str, least: int) -> None:
    """Start Ray on this machine ("") or join the cluster at `address`, and wait until it has `least` nodes.

    Raises BadInput when there is no such cluster, or fewer nodes have joined within three minutes."""
    import ray

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    settings["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if address:
        try:
            ray.init(address=address, **settings)
        except ConnectionError as error:
            raise BadInput(
                f"--address {address} is no running Ray cluster ({error}): start it by 'ray start'"
            ) from None
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **settings)
    deadline = time.monotonic() + NODES_WITHIN_S
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < least:
        if time.monotonic() > deadline:
            raise BadInput(
                f"--nodes is {least}, but {nodes} joined within {NODES_WITHIN_S:.0f} s: see the others' logs"
            )
        time.sleep(0.5)
    log.info("Ray: %d node%s, %g CPUs, %g GPUs", nodes, "s" * (nodes > 1), *resources())


def resources() -> tuple[float, float]:
    """(CPUs, GPUs) of the cluster."""
    import ray

    found = ray.cluster_resources()
    return found.get("CPU", 0.0), found.get("GPU", 0.0)
