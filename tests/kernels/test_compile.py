"""The kernels compiled for GPUs that are not here: they fit, spill nothing and move 16 bytes at a time."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cmgan_dist.kernels import bce_device, norm_device, norm_triton

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TRAINING = ("TRAINING", "AFFINE")
TILED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (norm_device.moments_kernel, ()),
    (norm_device.apply_kernel, TRAINING),
    (norm_device.apply_kernel, (*TRAINING, "DROPOUT")),
    (norm_device.sums_kernel, ("AFFINE",)),
    (norm_device.sums_kernel, ("AFFINE", "DROPOUT")),
    (norm_device.input_grad_kernel, ("AFFINE", "PARAMETERS")),
    (norm_device.input_grad_kernel, ("AFFINE", "PARAMETERS", "DROPOUT")),
)
"""Kernels whose launch has a tile, with the flags that a training step compiles them with."""
MORE: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (norm_device.apply_kernel, ()),
    (norm_device.apply_kernel, ("AFFINE",)),
    (norm_device.apply_kernel, ("TRAINING",)),
    (norm_device.apply_kernel, ("TRAINING", "DROPOUT")),
    (norm_device.sums_kernel, ()),
    (norm_device.sums_kernel, ("DROPOUT",)),
    (norm_device.input_grad_kernel, ()),
    (norm_device.input_grad_kernel, ("DROPOUT",)),
    (norm_device.input_grad_kernel, ("AFFINE",)),
    (norm_device.input_grad_kernel, ("AFFINE", "DROPOUT")),
)
"""The other flags that a launch can have: evaluation, no affine parameters, and their gradients among processes."""
PLAIN = (
    norm_device.pack_kernel,
    norm_device.unpack_kernel,
    norm_device.update_running_kernel,
    bce_device.bce_kernel,
)
SMALL = norm_triton.Tile(16, 128, 4)
REGISTERS_PER_SM = 65_536
WIDE = r"IMAD\.WIDE|IMAD\.HI|UIMAD\.WIDE"
WARPS_WANTED = 12
"""On a multiprocessor at once, so that loads of one hide behind those of others."""

# ---------------------------------------------------------------------------------------------- compile and read

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS = {"x", "y", "dy", "dx", "real", "fake", "mismatched"}
"""Pointers to what the model computes in; all others are float32."""
POINTERS = ROWS | {
    *("moments", "stats", "weight", "bias", "running_mean", "running_var", "out", "sums", "dweight", "dbias"),
    *("loss", "grad"),
}
OTHERS = {"seed": "*i64", "mask": "*i1", "totals": "*fp64"}
FLOATS = {"eps", "slope", "p", "momentum", "fake_weight", "mismatched_weight"}
ONES = {"n1", "groups", "parts", "splits", "steps"}
"""May be 1."""
ALIGNED = {"x_stride", "dy_stride", "channels"}
"""Multiples of 16, as for every width of the presets."""


@dataclass(frozen=True)
class Compiled:
    """What one kernel is on one architecture."""

    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread in local memory: spilled registers."""
    shared: int
    """Bytes per block."""
    opcodes: dict[str, int]
    """Count of each SASS instruction, with modifiers."""

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


@cache
def compiled(
    kernel: Any,
    capability: int,
    dtype: str,
    tile: norm_triton.Tile,
    flags: tuple[str, ...],
    folder: Path,
    inductor: bool = False,
) -> Compiled:
    """`kernel` for sm_`capability` with rows in `dtype` (fp32, bf16, fp16); `flags`: constexprs that are true.

    `inductor`: with the arguments as torch.compile passes them, floats in float64 and ones as constants."""
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


# ---------------------------------------------------------------------------------------------- tests


def check(made: Compiled, warps: int) -> None:
    assert made.stack == 0, "registers are spilled"
    assert made.shared <= 16 * 1024, "shared memory limits the number of blocks"
    per_block = warps * 32 * (-(-made.registers // 8) * 8)
    assert REGISTERS_PER_SM // per_block * warps >= WARPS_WANTED, f"{made.registers} registers leave too few warps"


def check_tiled(kernel: Any, flags: tuple[str, ...], dtype: str, tile: norm_triton.Tile, sm: int, folder: Path) -> None:
    made = compiled(kernel, sm, dtype, tile, flags, folder)
    check(made, tile.warps)
    per_thread = tile.rows * tile.columns // (tile.warps * 32)
    vectors = per_thread * (4 if dtype == "fp32" else 2) // 16
    name = kernel.__name__
    rows_read = 2 if name in ("sums_kernel", "input_grad_kernel") else 1
    assert made.count(r"LDG\.E(\.\w+)*\.128") >= rows_read * vectors
    if name in ("apply_kernel", "input_grad_kernel"):
        assert made.count(r"STG\.E(\.\w+)*\.128") == vectors
        assert made.count(r"STG\.E(\.\w+)*\.U?(8|16)$") == 0
    if "DROPOUT" in flags:  # 10 rounds of two wide multiplications, once per 4 elements; addresses take some too
        without = compiled(kernel, sm, dtype, tile, tuple(f for f in flags if f != "DROPOUT"), folder)
        assert 0 < made.count(WIDE) - without.count(WIDE) <= 20 * per_thread // 4


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("case", [2, 6], ids=["apply", "input_grad"])
def test_kernels_fit_every_architecture(sm: int, case: int, tmp_path: Path) -> None:
    check_tiled(*TILED[case], "bf16", norm_triton.TILES[1], sm, tmp_path)


@pytest.mark.parametrize("case", [0, 4])
def test_reductions_fit(case: int, tmp_path: Path) -> None:
    check_tiled(*TILED[case], "bf16", norm_triton.TILES[1], 90, tmp_path)


@pytest.mark.parametrize("kernel", PLAIN, ids=lambda k: k.__name__)
def test_small_kernels_fit(kernel: Any, tmp_path: Path) -> None:
    check(compiled(kernel, 90, "fp32", SMALL, (), tmp_path), 4)


@pytest.mark.parametrize(
    ("kernel", "flags", "dtype", "tile"),
    [(*case, "bf16", norm_triton.TILES[1]) for case in TILED]
    + [(kernel, ("WRONG", "MASK"), "fp32", SMALL) for kernel in PLAIN],
)
def test_arguments_of_inductor_change_nothing(
    kernel: Any, flags: tuple[str, ...], dtype: str, tile: norm_triton.Tile, tmp_path: Path
) -> None:
    """torch.compile passes Python floats in float64 and ones as constants."""
    made = compiled(kernel, 90, dtype, tile, flags, tmp_path, inductor=True)
    check(made, tile.warps)
    double = kernel in (norm_device.pack_kernel, norm_device.unpack_kernel)
    assert (made.count("D(ADD|MUL|FMA|SETP)") > 0) == double


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("tile", norm_triton.TILES, ids=lambda t: f"{t.rows}x{t.columns}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_configuration(sm: int, tile: norm_triton.Tile, dtype: str, tmp_path: Path) -> None:
    for kernel, flags in TILED + MORE:
        check_tiled(kernel, flags, dtype, tile, sm, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_small_kernels_on_every_architecture(sm: int, tmp_path: Path) -> None:
    for kernel in PLAIN:
        check(compiled(kernel, sm, "fp32", SMALL, (), tmp_path), 4)
