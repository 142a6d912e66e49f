"""The modelled part of bench/kernels.py: bytes, launches and time on an H100, by the roofline model."""

from __future__ import annotations

from typing import Any

from bench.kernels_rivals import WIDTH

BANDWIDTH, PEAK, LAUNCH_US = 3.35e12 * 0.9, 989e12 * 0.7, 2.5
"""Assumed of an H100: 90 % of 3.35 TB/s, 70 % of dense bfloat16, and what a kernel costs at least."""


def modelled(batch: int, width: int = WIDTH, size: int = 2, groups: int = 2) -> dict[str, Any]:
    """Bytes, launches and time of the shared layer's GEMM and epilogue, forward and backward, of both modalities.

    Sweeps over the [R, C] activations. Eager: batch_norm reads x twice and writes, cat reads and writes, leaky_relu
    reads and writes; back, leaky_relu reads two and writes, batch_norm reads two for its sums, reads two and writes,
    split's backward reads and writes. Fused: statistics read x, apply reads and writes; back, sums read two, the
    gradient reads two and writes."""
    rows = groups * batch
    tensor = rows * width * size
    gemm = max(3 * 2 * rows * width * width / PEAK * 1e6, 3 * LAUNCH_US)
    paths = {
        # launches: norm (2 each), cat, activation | activation, norm (2 each), cat, sums of parameter gradients
        "eager": {"sweeps": 7 + 10, "launches": 2 * groups + 2 + 1 + 2 * groups + 1 + 2 * (groups - 1)},
        "fused": {"sweeps": 3 + 5, "launches": 3 + 2},
    }
    out: dict[str, Any] = {"batch": batch, "gemm_us": gemm}
    for name, path in paths.items():
        moved = path["sweeps"] * tensor
        memory = moved / BANDWIDTH * 1e6
        out[name] = {
            **path,
            "MB": moved / 1e6,
            "epilogue_us": max(memory, path["launches"] * LAUNCH_US),
            "layer_us": gemm + max(memory, path["launches"] * LAUNCH_US),
            "saved_MB": (2 if name == "eager" else 1) * tensor / 1e6,
        }
    out["layer_ratio"] = out["eager"]["layer_us"] / out["fused"]["layer_us"]
    return out
