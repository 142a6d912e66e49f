"""Print a port of this machine that is free, with as many after it as a job needs.

python -m launchers.slurm.ports FIRST COUNT

Jobs meet at a port made from their id. A neighbour's program may hold it, or what is left of an earlier start.
"""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack

TRIED = 1000
"""Ports that are looked at before giving up."""


def free(port: int, count: int) -> bool:
    """Return whether nobody listens on `count` ports from `port` on, at any address of this machine."""
    with ExitStack() as held:
        for each in range(port, port + count):
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed one that lingers is free
            try:
                probe.bind(("", each))
                probe.listen()
            except OSError:
                return False
    return True


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2])
    found = next((port for port in range(first, min(first + TRIED, 65_537 - count), count) if free(port, count)), None)
    if found is None:
        sys.exit(
            f"error: no {count} free of the {TRIED} ports from {first} on: set MASTER_PORT (RAY_PORT for a search)"
        )
    print(found)
