"""Memory that a process frees and takes again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""The parameters M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)."""


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of handing it back to the kernel.

    Each step frees and takes the same gradients, and each batch of pictures the same activations: page faults for each
    4 KiB of them took a quarter of a step on a CPU (bench/step.py), and a fifth of the time of `shards features`."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc has it, musl has not
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
