"""Compile the Triton kernels for GPUs that are not here, and read what came out."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cmgan_dist.kernels.norm_triton import Tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS = {"x", "y", "dy", "dx", "real", "fake", "mismatched"}
"""Pointers to rows in the dtype that the model computes in; the other pointers are float32."""
POINTERS = ROWS | {
    *("moments", "stats", "weight", "bias", "running_mean", "running_var", "out", "sums", "dweight", "dbias"),
    *("loss", "grad"),
}
OTHERS = {"seed": "*i64", "mask": "*i1", "totals": "*fp64"}
FLOATS = {"eps", "slope", "p", "momentum", "fake_weight", "mismatched_weight"}
ONES = {"n1", "groups", "parts", "splits", "steps"}
"""Sizes that may be 1, which torch.compile then makes constants."""
ALIGNED = {"x_stride", "dy_stride", "channels"}
"""Sizes that are multiples of 16, as for every width of the presets."""


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one architecture, and of which instructions it is made."""

    registers: int
    """Registers of a thread."""
    stack: int
    """Bytes of a thread in local memory: spilled registers."""
    shared: int
    """Bytes of a block in shared memory."""
    opcodes: dict[str, int]
    """How often each SASS instruction, with its modifiers, stands in the code."""

    def count(self, pattern: str) -> int:
        """Return how many instructions match the regular expression `pattern`."""
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


@cache
def compiled(
    kernel: Any, capability: int, dtype: str, tile: Tile, flags: tuple[str, ...], folder: Path, inductor: bool = False
) -> Compiled:
    """Return `kernel` compiled for sm_`capability` with rows in `dtype` (fp32, bf16, fp16).

    `flags`: the constexprs that are true. `folder`: where the cubin is written. `inductor`: with the arguments as
    torch.compile passes them, floats in float64 and ones as constants."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    blocks = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns}
    for i, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], constants[name] = "constexpr", blocks.get(name, name in flags)
            continue
        if inductor and name in ONES:
            signature[name], constants[name] = "constexpr", 1
            continue
        pointer = "*" + (dtype if name in ROWS else "fp32") if name in POINTERS else None
        signature[name] = pointer or OTHERS.get(name) or (("fp64" if inductor else "fp32") if name in FLOATS else "i32")
        if signature[name].startswith("*") or name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tile.warps})
    cubin = folder / f"{kernel.__name__}-{capability}-{dtype}-{tile}-{flags}-{inductor}.cubin".replace(" ", "")
    cubin.write_bytes(made.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
    assert usage is not None
    registers, stack, shared, local = map(int, usage.groups())
    sass = _tool("nvdisasm", "-c", str(cubin))
    names = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)[ ;]", sass, re.MULTILINE)
    return Compiled(registers, stack + local, max(shared, made.metadata.shared), Counter(names))
