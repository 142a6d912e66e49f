"""The fused BatchNorm, LeakyReLU and dropout against float64: one set of tests, run by Triton's interpreter
(test_interpreter.py) and on a GPU (tests/gpu/test_norm.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.errors import BadInput
from cmgan_dist.kernels import dispatch, norm_triton
from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.models.discriminators import InterDiscriminator
from cmgan_dist.training import losses

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.INTERPRETED else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative to the largest value. The interpreter truncates on its way to bfloat16: one ulp, not half of one."""
SLOPE = 0.2


def close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Equal within `tolerance` of the largest expected value."""
    assert found is not None
    assert expected is not None
    expected = expected.detach().double()
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * max(scale, 1e-30))


def reference(groups: Sequence[int], module: GroupBatchNorm, training: bool) -> list[nn.BatchNorm1d]:
    """One float64 BatchNorm1d of torch per group with the module's parameters, shared."""
    made = []
    for k in range(len(groups)):
        bn = nn.BatchNorm1d(len(module.running_mean[0]), affine=module.weight is not None).double().to(DEVICE)
        if module.weight is not None and module.bias is not None:
            first = made[0] if made else bn
            bn.weight, bn.bias = first.weight, first.bias
            bn.weight.data, bn.bias.data = module.weight.data.double(), module.bias.data.double()
        bn.running_mean.copy_(module.running_mean[k])
        bn.running_var.copy_(module.running_var[k])
        made.append(bn.train(training))
    return made


def compare(
    groups: list[int], channels: int, dtype: torch.dtype, training: bool = True, affine: bool = True,
    slope: float = SLOPE, x: Tensor | None = None, tolerance: float | None = None,
) -> None:  # fmt: skip
    """Output, gradients and running statistics of the kernels against float64 BatchNorm1d per group + leaky_relu."""
    torch.manual_seed(0)
    module = GroupBatchNorm(channels, len(groups), affine, slope=slope, kernels="triton").to(DEVICE).train(training)
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2.0)
    if affine:
        nn.init.normal_(module.bias)
    if x is None:
        x = (torch.randn(sum(groups), channels) * 3 + 5).to(DEVICE, dtype)
    assert len(x) == sum(groups)
    norms = reference(groups, module, training)
    ours, theirs = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    out = module(ours, groups)
    parts = zip(norms, theirs.split(groups), strict=True)
    normal = torch.cat([bn(part) for bn, part in parts if len(part)])
    expected = F.leaky_relu(normal, slope)
    gradient = torch.randn(sum(groups), channels).to(DEVICE, dtype)
    gradient[normal.abs() < 1e-3] = 0  # rounding decides on which side of the kink they are
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    close(out, expected, tolerance)
    out.backward(gradient)
    expected.backward(gradient.double())
    close(ours.grad, theirs.grad, tolerance)
    if affine:
        close(module.weight.grad, norms[0].weight.grad, tolerance)
        close(module.bias.grad, norms[0].bias.grad, tolerance)
    for k, bn in enumerate(norms):
        close(module.running_mean[k], bn.running_mean, 1e-5)
        close(module.running_var[k], bn.running_var, 1e-5)


# ---------------------------------------------------------------------------------------------- values


LARGE = [pytest.param(1000, c, marks=pytest.mark.slow) for c in (17, 300, 1024)]


@pytest.mark.parametrize(("rows", "channels"), [(3, 17), (41, 17), (127, 17), (3, 300), (41, 300), (3, 1024), *LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(rows: int, channels: int, dtype: torch.dtype) -> None:
    compare([rows], channels, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "channels"), [(127, 300), (41, 1024), (127, 1024)])
def test_training_of_wide_layers(rows: int, channels: int) -> None:
    compare([rows], channels, torch.float32)


@pytest.mark.parametrize("groups", [[41, 3], [2, 127], [5, 0], [0, 9], [7, 7, 7], [3, 0, 4, 2], [130, 300]])
def test_groups(groups: list[int]) -> None:
    compare(groups, 20, torch.float32)


def test_half_precision() -> None:
    compare([41, 3], 17, torch.float16)


@pytest.mark.parametrize("groups", [[1], [1, 0], [41, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation(groups: list[int], dtype: torch.dtype) -> None:
    compare(groups, 17, dtype, training=False)


@pytest.mark.parametrize("training", [True, False])
def test_without_affine_or_activation(training: bool) -> None:
    compare([9, 4], 17, torch.float32, training, affine=False, slope=1.0)


@pytest.mark.parametrize("layout", ["transposed", "every other row", "column slice", "gradient of a sum"])
def test_layouts(layout: str) -> None:
    base = torch.randn(64, 80, device=DEVICE)
    if layout == "gradient of a sum":  # strides 0, 0
        module = GroupBatchNorm(80, slope=SLOPE, kernels="triton").to(DEVICE)
        x = base.requires_grad_()
        module(x, [64]).sum().backward()
        twin = GroupBatchNorm(80, slope=SLOPE, kernels="torch").double().to(DEVICE)
        twin.load_state_dict({**twin.state_dict(), "weight": module.weight.double(), "bias": module.bias.double()})
        y = base.detach().double().requires_grad_()
        twin(y, [64]).sum().backward()
        close(x.grad, y.grad, 1e-4)
        return
    x = {"transposed": base.T, "every other row": base[::2], "column slice": base[:, 3:40]}[layout]
    compare([len(x)], x.shape[1], torch.float32, x=x)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (1e4, 1.0), (-1e6, 1e3), (0.0, 1e-4), (3e18, 1e17)])
def test_badly_conditioned(mean: float, std: float) -> None:
    """x is what it is after rounding to fp32. A sum of squares would lose all digits of the first."""
    torch.manual_seed(1)
    x = (torch.randn(333, 24, dtype=torch.float64) * std + mean).float().to(DEVICE)
    compare([200, 133], 24, torch.float32, x=x, tolerance=1e-4)


def test_an_outlier_in_the_first_row() -> None:
    """The first row is 1e4 standard deviations away: statistics about it as a pivot would cancel."""
    torch.manual_seed(2)
    x = torch.randn(200, 8)
    x[0] = 1e4
    compare([200], 8, torch.float32, x=x.to(DEVICE), tolerance=1e-4)


def test_large_values_of_low_precision_stay_finite() -> None:
    compare([40], 16, torch.bfloat16, x=(torch.randn(40, 16) * 1e17).to(DEVICE, torch.bfloat16), tolerance=2**-6)
    compare([40], 16, torch.float16, x=(torch.randn(40, 16).clamp(-3, 3) * 2e4).to(DEVICE, torch.float16))


def test_no_rows_at_all() -> None:
    module = GroupBatchNorm(8, 2, slope=SLOPE, kernels="triton").to(DEVICE)
    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    out = module(x, [0, 0])
    out.sum().backward()
    assert out.shape == (0, 8)
    assert x.grad is not None
    assert torch.equal(module.running_var, torch.ones(2, 8, device=DEVICE))
    assert torch.equal(module.weight.grad, torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize("capacity", [1, 3, 9])
def test_any_split_of_the_rows(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the reduction, also more than there are rows for."""
    plan = norm_triton.LaunchPlan.of

    def forced(groups: Sequence[int], channels: int) -> norm_triton.LaunchPlan:
        made = plan(groups, channels)
        return norm_triton.LaunchPlan(made.tile, made.column_blocks, -(-made.row_blocks // 3), capacity, 3, made.sizes)

    monkeypatch.setattr(norm_triton.LaunchPlan, "of", staticmethod(forced))
    compare([100, 9], 20, torch.float32)


@pytest.mark.parametrize("tile", norm_triton.TILES, ids=lambda t: f"{t.rows}x{t.columns}")
def test_every_tile(tile: norm_triton.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_triton, "choose_tile", lambda rows, channels: tile)
    compare([70, 33], 130, torch.float32)
    dropout_is_philox(rows=33, channels=130)


# ---------------------------------------------------------------------------------------------- dropout


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011) of counters [N] and a 64-bit key: uint32 [N, 4]."""
    c = np.zeros((4, len(counter)), np.uint64)
    c[0] = counter
    low, high = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = np.stack([(b >> shift) ^ c[1] ^ low, b & word, (a >> shift) ^ c[3] ^ high, a & word])
        low, high = (low + np.uint64(0x9E3779B9)) & word, (high + np.uint64(0xBB67AE85)) & word
    return c.T.astype(np.uint32)


def kept(rows: int, channels: int, key: int, p: float) -> Tensor:
    """Dropout factors [R, C], by numpy."""
    quads = -(-channels // 4)
    draws = philox(np.arange(rows * quads, dtype=np.uint64), key).reshape(rows, quads * 4)[:, :channels]
    signed = draws.astype(np.int32).astype(np.float64)  # as Triton's uint_to_uniform_float
    uniform = np.where(signed < 0, -signed - 1, signed) * 4.6566127342e-10
    return torch.from_numpy((uniform >= p) / (1 - p)).to(DEVICE)


def dropout_is_philox(rows: int, channels: int, p: float = 0.3) -> None:
    torch.manual_seed(3)
    key = 0x1234567_89ABCDEF
    x = torch.randn(rows, channels, device=DEVICE, requires_grad=True)
    weight = torch.rand(channels, device=DEVICE).add(0.5).requires_grad_()
    bias = torch.randn(channels, device=DEVICE).requires_grad_()
    seed = torch.tensor([key], device=DEVICE)
    out, _ = norm_triton.group_norm_act(x, [rows], weight, bias, None, None, seed, True, False, 1e-5, SLOPE, p)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    plain = F.leaky_relu(F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True), SLOPE)
    expected = plain * kept(rows, channels, key, p)
    close(out, expected, 1e-5)
    gradient = torch.randn_like(x)
    ours = torch.autograd.grad(out, (x, weight, bias), gradient)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves, gradient.double()), strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize(("rows", "channels"), [(41, 17), (9, 66), (140, 12)])
def test_dropout_is_philox_by_position_forward_and_backward(rows: int, channels: int) -> None:
    dropout_is_philox(rows, channels)


def test_dropout_share_seed_and_evaluation() -> None:
    module = GroupBatchNorm(64, slope=SLOPE, dropout=0.25, kernels="triton").to(DEVICE)
    x = torch.randn(200, 64, device=DEVICE)
    torch.manual_seed(4)
    first, second = module(x, [200]), module(x, [200])
    torch.manual_seed(4)
    again = module(x, [200])
    assert torch.equal(first, again)
    assert not torch.equal(first == 0, second == 0)
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.02  # 12,800 draws: 5 standard deviations
    assert (module.eval()(x, [200]) != 0).all()


def test_activation_checkpointing_draws_the_same_mask() -> None:
    module = GroupBatchNorm(32, slope=SLOPE, dropout=0.5, kernels="triton").to(DEVICE)
    x = torch.randn(20, 32, device=DEVICE, requires_grad=True)
    grads = []
    for run in (module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run(x, [20]).square().sum(), (x, module.weight)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("groups", [[9], [6, 5]])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivative(groups: list[int], training: bool) -> None:
    """What R1 asks for: the gradient, with respect to parameters and input, of the gradient's square."""
    torch.manual_seed(6)
    ours = GroupBatchNorm(7, len(groups), slope=SLOPE, kernels="triton").to(DEVICE).train(training)
    twin = GroupBatchNorm(7, len(groups), slope=SLOPE, kernels="torch").to(DEVICE).double().train(training)
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(sum(groups), 7, device=DEVICE)
    factor = torch.randn(sum(groups), 7, device=DEVICE)
    found = []
    for module, at in ((ours, x.clone().requires_grad_()), (twin, x.double().requires_grad_())):
        out = module(at, groups).pow(3).mul(factor.to(at.dtype)).sum()
        (first,) = torch.autograd.grad(out, at, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (at, module.weight, module.bias)))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("penalty", [losses.squared_gradient_norm, losses.gradient_penalty])
@pytest.mark.parametrize("spectral", [False, True])
def test_penalties_through_the_discriminator(penalty: partial[Tensor], spectral: bool) -> None:
    """R1 and WGAN-GP of an inter-modality discriminator: parameter gradients equal those of the torch path."""
    found = []
    for kernels in ("triton", "torch"):
        torch.manual_seed(7)
        config = ModelConfig(common_dim=6, discriminator_dim=10, kernels=kernels, spectral_norm=spectral)
        module = InterDiscriminator(5, config).to(DEVICE)
        at = [torch.randn(8, n, device=DEVICE).requires_grad_() for n in (6, 5)]
        (penalty(module(*at, [8]), at)).backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) >= 3
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-3)


def test_second_derivative_with_dropout_is_refused() -> None:
    module = GroupBatchNorm(4, dropout=0.5, kernels="triton").to(DEVICE)
    x = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(module(x, [6]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: set model"):
        first.sum().backward()


# ---------------------------------------------------------------------------------------------- processes


class Exchange:
    """The all-reduce of one process: its first call is forward's, its second backward's."""

    def __init__(self, sent: list[list[Tensor]], made: list[list[Tensor]], world: int) -> None:
        """`sent`: what all processes gave in an earlier pass, per call; `made` takes what this one gives."""
        self.sent, self.made, self.world, self.call = sent, made, world, 0

    def __call__(self, own: Tensor) -> None:
        sent, made = self.sent[self.call], self.made[self.call]
        self.call += 1
        made.append(own.clone())
        own.copy_(torch.stack(sent or [own] * self.world).sum(0))


MANY = pytest.param([[3, 3]] * 9, 1e4, 1e-1, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("rows", "mean", "std"),
    [
        ([[5, 3], [4, 6]], 100.0, 2.0),
        ([[5, 3], [4, 6]], 1e4, 1e-1),
        ([[7, 0], [1, 9]], 1e4, 1e-1),
        ([[3, 3]] * 5, 100.0, 2.0),
        MANY,
    ],
)
def test_synchronised_statistics(
    rows: list[list[int]], mean: float, std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W processes in turn, their all-reduce the sum of what each gave in an earlier pass: output, gradients and running
    statistics equal those of one process with all rows. Rows are unequal, a group may be empty in one process."""
    torch.manual_seed(8)
    world, channels = len(rows), 5
    parts = [[torch.randn(n, channels, device=DEVICE) * std + mean for n in part] for part in rows]
    whole = [torch.cat([parts[w][k] for w in range(world)]) for k in range(2)]
    twin = GroupBatchNorm(channels, 2, slope=SLOPE, kernels="torch").to(DEVICE).double()
    modules = []
    for _ in range(world):
        modules.append(GroupBatchNorm(channels, 2, slope=SLOPE, kernels="triton").to(DEVICE))
        modules[-1].load_state_dict(twin.state_dict())
    everything = torch.cat(whole).double().requires_grad_()
    expected = twin(everything, [len(t) for t in whole])
    (expected**2).sum().backward()
    order = [torch.cat([everything.grad.split([len(t) for t in whole])[k].split([r[k] for r in rows])[w]
                        for k in range(2)]) for w in range(world)]  # fmt: skip
    sent: list[list[Tensor]] = [[], []]
    for final in (False, False, True):  # moments are right in the second pass, sums in the third
        inputs = [torch.cat(part).requires_grad_() for part in parts]
        made: list[list[Tensor]] = [[], []]
        for w, module in enumerate(modules):
            module.synchronised = True
            monkeypatch.setattr(dist, "all_reduce", Exchange(sent, made, world))
            module.running_mean.zero_()
            module.running_var.fill_(1.0)
            module.zero_grad()
            (module(inputs[w], rows[w]) ** 2).sum().backward()
        sent = made
        if final:
            for w in range(world):
                close(inputs[w].grad, order[w], 1e-4)
            for name in ("weight", "bias"):
                close(torch.stack([getattr(m, name).grad for m in modules]).sum(0), getattr(twin, name).grad, 1e-4)
            close(modules[0].running_mean, twin.running_mean, 1e-5)
            close(modules[-1].running_var, twin.running_var, 1e-5)


def test_synchronised_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process through the collective's path equals the plain path."""
    torch.manual_seed(9)
    plain = GroupBatchNorm(5, 2, slope=SLOPE, kernels="triton").to(DEVICE)
    synced = GroupBatchNorm(5, 2, slope=SLOPE, kernels="triton").to(DEVICE)
    synced.load_state_dict(plain.state_dict())
    synced.synchronised = True
    monkeypatch.setattr(dist, "all_reduce", lambda t: None)
    x = torch.randn(12, 5, device=DEVICE)
    found = []
    for module in (plain, synced):
        at = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(at, [4, 8]).pow(3).sum(), at, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (at, module.weight, module.bias)))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-5)


# ---------------------------------------------------------------------------------------------- the operator


def arguments(training: bool, seed: bool, affine: bool, synchronised: bool) -> tuple[object, ...]:
    x = torch.randn(11, 6, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, device=DEVICE, requires_grad=True) if affine else None
    bias = torch.randn(6, device=DEVICE, requires_grad=True) if affine else None
    running = (None, None) if training else (torch.zeros(2, 6, device=DEVICE), torch.ones(2, 6, device=DEVICE))
    key = torch.tensor([7], device=DEVICE) if seed else None
    return x, [5, 6], weight, bias, *running, key, training, synchronised, 1e-5, SLOPE, 0.5 if seed else 0.0


CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor"]


@pytest.mark.parametrize("training", [True, False, "synchronised"])
@pytest.mark.parametrize("seed", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(training: bool | str, seed: bool, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter runs on memory, and fake tensors, which the fourth check traces with, have none.
    checks = CHECKS if dispatch.INTERPRETED else [*CHECKS, "test_aot_dispatch_dynamic"]
    monkeypatch.setattr(dist, "all_reduce", lambda t: None)
    args = arguments(bool(training), seed, affine, training == "synchronised")
    torch.library.opcheck(norm_triton.group_norm_act, args, test_utils=checks)
    stats = norm_triton.group_norm_act(*args)[1].detach()
    x, groups, weight, bias, _, _, key, *constants = args
    back = (torch.randn(11, 6, device=DEVICE), x, groups, weight, bias, stats, key, *constants)
    torch.library.opcheck(norm_triton.group_norm_act_backward, back, test_utils=checks)
    running = (torch.zeros(2, 6, device=DEVICE), torch.ones(2, 6, device=DEVICE))
    torch.library.opcheck(norm_triton.update_running, (stats, *running, 0.1), test_utils=checks)


def test_autocast_keeps_the_dtype_of_the_linear_layer() -> None:
    """Rows in bfloat16 as the GEMM made them, parameters and statistics in float32: as torch's batch_norm."""
    linear = nn.Linear(12, 8, bias=False).to(DEVICE)
    norms = [GroupBatchNorm(8, slope=SLOPE, kernels=k).to(DEVICE) for k in ("triton", "torch")]
    norms[1].load_state_dict(norms[0].state_dict())
    x = torch.randn(10, 12, device=DEVICE)
    outputs = []
    for norm in norms:
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs.append(norm(linear(x), [10]))
        outputs[-1].float().square().sum().backward()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert norms[0].weight.grad.dtype == torch.float32
    close(outputs[0], outputs[1].detach(), 2**-6)
    close(norms[0].weight.grad, norms[1].weight.grad, 2**-5)


def test_one_row_has_no_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    module = GroupBatchNorm(4, 2, kernels="triton").to(DEVICE)
    with pytest.raises(ValueError, match="two rows or more"):
        module(torch.randn(5, 4, device=DEVICE), [4, 1])
    module.synchronised = True
    monkeypatch.setattr(dist, "all_reduce", lambda t: None)
    with pytest.raises(ValueError, match="two rows or more"):
        module(torch.randn(5, 4, device=DEVICE), [4, 1])


@pytest.mark.parametrize("affine", [True, False])
def test_another_number_of_channels_is_refused(affine: bool) -> None:
    module = GroupBatchNorm(4, 2, affine=affine, kernels="triton").to(DEVICE)
    with pytest.raises(ValueError, match="BatchNorm of 4 channels, x has 5"):
        module(torch.randn(6, 5, device=DEVICE), [3, 3])


def test_what_the_kernels_do_not_take_is_refused_in_training_only() -> None:
    module = GroupBatchNorm(4, 2, kernels="triton").to(DEVICE).double()
    x = torch.randn(6, 4, device=DEVICE, dtype=torch.float64)
    with pytest.raises(BadInput, match=r"model.kernels is triton but .* not torch.float64: set it to auto or torch"):
        module(x, [3, 3])
    assert module.eval()(x, [3, 3]).dtype == torch.float64
    many = GroupBatchNorm(4, 5, kernels="triton").to(DEVICE)
    with pytest.raises(BadInput, match="4 groups, not 5"):
        many(x.float(), [2, 1, 1, 1, 1])
