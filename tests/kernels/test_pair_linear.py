"""Split weights against concatenation: values, both derivatives, spectral normalisation, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.kernels.pair_linear import pair_linear
from cmgan_dist.models.discriminators import InterDiscriminator

GROUPS = [4, 4, 3]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((11, 5), (4, 7), (3, 7), (6, 12))
    common, first, second, weight = (torch.randn(s, dtype=dtype).requires_grad_() for s in shapes)
    return common, first, second, weight


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (3,), (1, 2), (0, 1, 2)])
def test_equals_the_linear_layer_on_the_concatenation(shared: bool, frozen: tuple[int, ...]) -> None:
    tensors = inputs()
    for i in frozen:
        tensors[i].requires_grad_(False)
    common, first, second, weight = tensors
    whole = torch.cat([first, first, second])
    out = pair_linear(common, [first, first, second] if shared else whole, GROUPS, weight)
    expected = F.linear(torch.cat([common, whole], 1), weight)
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    wanted = [t for t in tensors if t.requires_grad]
    ours = torch.autograd.grad(out, wanted, gradient)
    for a, b in zip(ours, torch.autograd.grad(expected, wanted, gradient), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_both_orders_are_those_of_finite_differences() -> None:
    common, first, second, weight = inputs()

    def run(c: Tensor, f: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return pair_linear(c, [f, f, s], GROUPS, w)

    assert torch.autograd.gradcheck(run, (common, first, second, weight))
    assert torch.autograd.gradgradcheck(run, (common, first, second, weight))


def test_the_repeated_feature_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (seen.append(len(a)), plain(a, b))[1])
    common, first, second, weight = inputs()
    pair_linear(common, [first, first, second], GROUPS, weight)
    assert seen == [4, 3]


def test_autocast_runs_in_its_dtype_and_gives_gradients_in_the_parameters() -> None:
    common, first, second, weight = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = pair_linear(common, [first, first, second], GROUPS, weight)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    whole = torch.cat([common, torch.cat([first, first, second])], 1)
    torch.testing.assert_close(out.float(), F.linear(whole, weight), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("spectral", [False, True])
def test_discriminator_of_repeated_features_equals_that_of_the_concatenation(spectral: bool) -> None:
    """Both ways of passing features; spectral normalisation still bounds the whole weight."""
    torch.manual_seed(1)
    module = InterDiscriminator(7, ModelConfig(common_dim=5, discriminator_dim=6, spectral_norm=spectral))
    common, feature, mismatched = torch.randn(12, 5), torch.randn(4, 7), torch.randn(4, 7)
    for _ in range(30):  # power iterations converge
        module(common, [feature, feature, mismatched], [4, 4, 4])
    one = module(common, [feature, feature, mismatched], [4, 4, 4])
    other = module(common, torch.cat([feature, feature, mismatched]), [4, 4, 4])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if spectral:
        assert abs(float(torch.linalg.matrix_norm(module.hidden.weight.detach(), 2)) - 1) < 1e-3
    names = {name for name, _ in module.named_parameters()}
    assert ("hidden.parametrizations.weight.original" if spectral else "hidden.weight") in names


def test_what_does_not_fit_is_said() -> None:
    common, first, second, weight = inputs()
    with pytest.raises(ValueError, match="group 2 has 4 rows"):
        pair_linear(common, [first, first, second], [4, 4, 4], weight)
    with pytest.raises(ValueError, match="do not add up to 11 rows"):
        pair_linear(common, [first, second], [4, 3], weight)
