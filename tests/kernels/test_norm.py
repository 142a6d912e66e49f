"""BatchNorm per group of rows against torch's BatchNorm1d, and merged statistics against float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.kernels.dropout import dropout
from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.kernels.norm_torch import group_batch_norm, synchronised_statistics
from cmgan_dist.models.generator import JOINED_ON_CPU, SharedLayers


@pytest.mark.parametrize("groups", [[5, 9], [2, 41], [16]])
@pytest.mark.parametrize("training", [True, False])
def test_equals_one_batchnorm_per_group(groups: list[int], training: bool) -> None:
    torch.manual_seed(0)
    ours = GroupBatchNorm(17, statistics=len(groups))
    x = torch.randn(sum(groups), 17) * 3 + 5
    x.requires_grad_()
    reference = [nn.BatchNorm1d(17) for _ in groups]
    for bn in reference:
        bn.weight.data, bn.bias.data = ours.weight.data.clone(), ours.bias.data.clone()
    twin = x.detach().clone().requires_grad_()
    for module in (ours, *reference):
        module.train(training)
    out = ours(x, groups)
    expected = torch.cat([bn(part) for bn, part in zip(reference, twin.split(groups), strict=True)])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(ours.weight.grad, sum(bn.weight.grad for bn in reference))
    for k, bn in enumerate(reference):
        torch.testing.assert_close(ours.running_mean[k], bn.running_mean)
        torch.testing.assert_close(ours.running_var[k], bn.running_var)


def test_groups_are_not_normalised_together() -> None:
    x = torch.cat([torch.randn(8, 3), torch.randn(8, 3) + 10])
    out = group_batch_norm(x, [8, 8], torch.ones(3), torch.zeros(3), None, training=True)
    for part in out.split(8):
        assert part.mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("synchronised", [False, True])
def test_an_empty_group_is_passed_over(synchronised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bn = GroupBatchNorm(4, statistics=2)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(2))  # two processes with the same rows
    bn.synchronised = synchronised
    x = torch.randn(6, 4, requires_grad=True)
    out = bn(x, [6, 0])
    out.square().sum().backward()
    assert out.shape == (6, 4)
    assert torch.equal(bn.running_mean[1], torch.zeros(4))
    assert torch.equal(bn.running_var[1], torch.ones(4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("synchronised", [False, True])
def test_one_row_has_no_variance(synchronised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bn = GroupBatchNorm(4, statistics=2)
    monkeypatch.setattr(dist, "all_reduce", lambda t: None)
    bn.synchronised = synchronised
    with pytest.raises(ValueError, match=r"more than 1 value|two rows or more"):
        bn(torch.randn(5, 4), [4, 1])


def test_no_running_statistics_no_eval_mode() -> None:
    with pytest.raises(ValueError, match="no eval mode"):
        GroupBatchNorm(4, statistics=0).eval()(torch.randn(5, 4), [5])


@pytest.mark.parametrize("training", [True, False])
def test_activation_and_dropout_follow(training: bool) -> None:
    whole = GroupBatchNorm(32, slope=0.2, dropout=0.4).train(training)
    bare = GroupBatchNorm(32).train(training)
    bare.load_state_dict(whole.state_dict())
    x = torch.randn(20, 32)
    torch.manual_seed(3)
    found = whole(x, [20])
    torch.manual_seed(3)
    assert torch.equal(found, dropout(F.leaky_relu(bare(x, [20]), 0.2), 0.4, training))


def test_reference_passes_gradcheck_twice_in_float64() -> None:
    torch.manual_seed(4)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.leaky_relu(group_batch_norm(x, [4, 3], weight, bias, None, training=True), 0.2)

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_merged_statistics_equal_those_of_all_rows(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal parts, badly conditioned: a sum of squares in fp32 would be off by orders of magnitude at 1e4."""
    torch.manual_seed(1)
    parts = [torch.randn(n, 6) + shift for n in (7, 19, 3)]
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda t: sent.append(t.clone()))
    for part in parts:
        synchronised_statistics([part])
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.copy_(sum(sent)))
    mean, variance, rows = synchronised_statistics([parts[0]])[0]
    assert sent[0].shape == (1, 2 * 6 + 1), "what travels does not depend on the number of processes"
    everything = torch.cat(parts).double()
    assert rows == 29
    torch.testing.assert_close(mean.double(), everything.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), everything.var(0, unbiased=False), rtol=1e-3, atol=0)


def test_synchronised_path_of_one_process_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    plain, synced = GroupBatchNorm(5, statistics=2), GroupBatchNorm(5, statistics=2)
    synced.load_state_dict(plain.state_dict())
    monkeypatch.setattr(dist, "all_reduce", lambda t: None)
    synced.synchronised = True
    x = torch.randn(12, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out_a, out_b = plain(a, [4, 8]), synced(b, [4, 8])
    torch.testing.assert_close(out_a, out_b)
    (out_a**3).sum().backward()
    (out_b**3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(plain.running_var, synced.running_var)


@pytest.mark.parametrize("rows", [(5, 9), (JOINED_ON_CPU + 1, 3)])
def test_one_gemm_or_two_is_the_same_function(rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and running statistics of both modalities, whichever way their sizes choose."""
    torch.manual_seed(5)
    layer = SharedLayers(ModelConfig(hidden_dim=6, common_dim=4))
    other = copy.deepcopy(layer)
    image, text = torch.randn(rows[0], 6), torch.randn(rows[1], 6)
    assert layer.joins(image, text) == (max(rows) <= JOINED_ON_CPU)
    layer.norm[0].synchronised = True
    assert layer.joins(image, text), "one collective for both modalities"
    layer.norm[0].synchronised = False
    monkeypatch.setattr(other, "joins", lambda image, text: not layer.joins(image, text))
    found = []
    for module in (layer, other):
        outputs = module(image, text)
        sum(out.square().sum() for out in outputs).backward()
        found.append([*outputs, *(p.grad for p in module.parameters()), *module.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
