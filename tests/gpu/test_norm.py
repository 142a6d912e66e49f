"""The fused BatchNorm compiled and run on a GPU: all of tests/kernels/norm_cases.py, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.kernels.norm import GroupBatchNorm
from tests.kernels.norm_cases import *  # noqa: F403
from tests.kernels.norm_cases import SLOPE, close, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def module(channels: int, dropout: float = 0.0, kernels: str = "triton") -> GroupBatchNorm:
    torch.manual_seed(0)
    return GroupBatchNorm(channels, 2, slope=SLOPE, dropout=dropout, kernels=kernels).cuda()


def step(norm: GroupBatchNorm, x: Tensor, groups: list[int]) -> tuple[Tensor, ...]:
    out = norm(x, groups)
    return out, *torch.autograd.grad(out.float().square().sum(), (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [[4096, 4096], [64, 64], [1000, 41]])
@pytest.mark.parametrize("channels", [1024, 300, 512])
def test_sizes_of_training(groups: list[int], channels: int, dtype: torch.dtype) -> None:
    compare(groups, channels, dtype, tolerance={torch.float32: 1e-4}.get(dtype))


def test_auto_takes_the_kernels_and_agrees_with_torch() -> None:
    x = torch.randn(128, 256, device="cuda", requires_grad=True)
    auto, plain = module(256, kernels="auto"), module(256, kernels="torch")
    assert "group_norm_act" in str(auto(x, [64, 64]).grad_fn)
    for a, b in zip(step(auto, x, [64, 64]), step(plain, x, [64, 64]), strict=True):
        close(a, b, 1e-4)


def test_runs_repeat_to_the_bit() -> None:
    x = torch.randn(5000, 512, device="cuda", requires_grad=True)
    first, second = (step(module(512), x, [3000, 2000]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False, "synchronised"])
def test_compiled_without_a_graph_break(training: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled_ = module(128).train(bool(training)), module(128).train(bool(training))
    monkeypatch.setattr(dist, "all_reduce", lambda t: None)  # a process among one
    compiled_.synchronised = training == "synchronised"
    x = torch.randn(96, 128, device="cuda", requires_grad=True)
    fast = torch.compile(lambda x: compiled_(x.sin(), [64, 32]).cos(), fullgraph=True)
    ours, theirs = fast(x), eager(x.sin(), [64, 32]).cos()
    close(ours, theirs, 1e-5)
    (a,), (b,) = (torch.autograd.grad(t.square().sum(), x) for t in (ours, theirs))
    close(a, b, 1e-4)
    close(compiled_.running_var, eager.running_var, 1e-6)


def test_cuda_graph_replays_new_input_and_new_masks() -> None:
    norm = module(64, dropout=0.5)
    static = torch.randn(96, 64, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(norm, static, [48, 48])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(norm, static, [48, 48])
    plain = module(64, kernels="torch")
    masks = []
    for _ in range(2):
        with torch.no_grad():
            static.copy_(torch.randn_like(static))
        graph.replay()
        mask = (outputs[0] != 0).float() * 2
        masks.append(mask)
        expected = plain(static, [48, 48]) * mask
        close(outputs[0], expected, 1e-5)
        for ours, theirs in zip(
            outputs[1:], torch.autograd.grad(expected.square().sum(), (static, plain.weight, plain.bias)), strict=True
        ):
            close(ours, theirs, 1e-4)
    assert not torch.equal(*masks)


def test_more_elements_than_a_32_bit_index_holds() -> None:
    """3,200,000 x 1,024 bfloat16 (6.6 GB): the last rows are normalised like the first."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    rows, channels = 3_200_000, 1024
    norm = module(channels)
    x = torch.empty(rows, channels, device="cuda", dtype=torch.bfloat16).normal_()
    with torch.no_grad():
        out = norm(x, [rows // 2, rows // 2])
        for part in (slice(0, 100), slice(rows - 100, rows)):
            half = x[: rows // 2] if part.start == 0 else x[rows // 2 :]
            variance, mean = torch.var_mean(half[:, :8].double(), 0, unbiased=False)
            normal = (x[part, :8].double() - mean) * (variance + norm.eps).rsqrt()
            expected = F.leaky_relu(normal * norm.weight[:8] + norm.bias[:8], SLOPE)
            close(out[part, :8], expected, 2**-7)
