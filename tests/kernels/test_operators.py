"""The operators as the compiler sees them, on tensors of a GPU that is not there; which path is chosen, and its log."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from cmgan_dist.errors import BadInput
from cmgan_dist.kernels import dispatch, norm_triton
from cmgan_dist.kernels.bce import discriminator_bce
from cmgan_dist.kernels.norm import GroupBatchNorm


def kernels_in_the_graph(function: Callable[..., object], *tensors: Tensor) -> list[str]:
    """Triton kernels and sums over processes that torch.compile's backend gets to see."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, args: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with torch.no_grad():
        aot_function(function, fw_compiler=keep)(*tensors)
    side = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    found = []
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if "triton_kernel_wrapper" in str(node.target):
            found.append(side.get_kernel(node.kwargs["kernel_idx"]).fn.__name__)
        elif node.target is torch.ops.cmgan.sum_over_processes.default:
            found.append("sum_over_processes")
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_sees_through_the_operators() -> None:
    with FakeTensorMode():

        def new(*shape: int) -> Tensor:
            return torch.empty(*shape, device="cuda")

        x, weight, bias, stats = new(96, 128).bfloat16(), new(128), new(128), new(2, 4, 128)
        forward, backward = ["moments_kernel", "apply_kernel"], ["sums_kernel", "input_grad_kernel"]
        for synchronised in (False, True):
            constants = (True, synchronised, 1e-5, 0.2, 0.0)
            if synchronised:
                forward[1:1] = ["pack_kernel", "sum_over_processes", "unpack_kernel"]
                backward[1:1] = ["sum_over_processes"]
            found = kernels_in_the_graph(
                lambda x, w, b, c=constants: norm_triton.group_norm_act(x, [64, 32], w, b, None, None, None, *c),
                *(x, weight, bias),
            )
            assert found == forward
            found = kernels_in_the_graph(
                lambda x, w, b, s, c=constants: norm_triton.group_norm_act_backward(x, x, [64, 32], w, b, s, None, *c),
                *(x, weight, bias, stats),
            )
            assert found == backward
        found = kernels_in_the_graph(
            lambda s, m, v: norm_triton.update_running(s, m, v, 0.1), stats, new(2, 128), new(2, 128)
        )
        assert found == ["update_running_kernel"]
        found = kernels_in_the_graph(
            lambda r, f, w: discriminator_bce(r, f, w, None, 0.5, 0.5), new(64), new(64), new(64)
        )
        assert found == ["bce_kernel"]


def test_a_compiled_graph_of_the_torch_path_equals_eager() -> None:
    norm, twin = GroupBatchNorm(8, 2, slope=0.2), GroupBatchNorm(8, 2, slope=0.2)
    twin.load_state_dict(norm.state_dict())
    x = torch.randn(10, 8)
    fast = torch.compile(lambda x: norm(x, [6, 4]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), twin(x, [6, 4]))
    torch.testing.assert_close(norm.running_mean, twin.running_mean)


def test_the_path_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_path.cache_clear()
    x = torch.randn(4, 8)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            GroupBatchNorm(8)(x, [4])
            GroupBatchNorm(8, kernels="torch")(x, [4])
    assert caplog.messages == [
        "BatchNorm, LeakyReLU and dropout: torch (model.kernels is auto, the tensors are on cpu)",
        "BatchNorm, LeakyReLU and dropout: torch (model.kernels is torch)",
    ]


def test_only_the_first_process_of_a_run_says_the_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        dispatch.log_path.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            GroupBatchNorm(8)(torch.randn(4, 8), [4])
        assert len(caplog.messages) == lines


def test_triton_without_a_gpu_is_refused_in_training_and_only_there() -> None:
    norm = GroupBatchNorm(8, kernels="triton")
    x = torch.randn(4, 8)
    with pytest.raises(BadInput, match="is triton but the tensors are on cpu: set it to auto or torch"):
        norm(x, [4])
    torch.testing.assert_close(norm.eval()(x, [4]), GroupBatchNorm(8, affine=False).eval()(x, [4]) * norm.weight)


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    with pytest.raises(BadInput, match="Triton is not installed"):
        GroupBatchNorm(8, kernels="triton")(torch.randn(4, 8), [4])
