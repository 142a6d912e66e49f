"""Ray clusters of several nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster

OBJECT_STORE = 80 * 2**20


def add_node(cluster: Cluster) -> Any:
    """Add a node with one CPU."""
    return cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)


def lose_node(cluster: Cluster, node: Any) -> None:
    """Kill a node and what runs on it, as by a power cut."""
    cluster.remove_node(node, allow_graceful=False)


@contextmanager
def running_nodes(count: int) -> Iterator[Cluster]:
    """A cluster of nodes with one CPU each, gone at the end."""
    cluster = Cluster()
    for _ in range(count):
        add_node(cluster)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
