"""Dropout against a loop over the bits of the generator's numbers, and against what torch's own promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmgan_dist.kernels.dropout import LEVELS, dropout

TOLERANCES = [(torch.float64, 1e-14), (torch.float32, 2e-7), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]


def reference(x: Tensor, share: float, seed: int) -> Tensor:
    """One number of 64 bits for four elements, the lowest bits first, each compared as a signed one of 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator).tolist()
    dropped, out = round(share * LEVELS), []
    for i, value in enumerate(x.flatten().tolist()):
        bits = (numbers[i // 4] >> (16 * (i % 4))) % LEVELS
        level = (bits + LEVELS // 2) % LEVELS  # as an unsigned one, from the lowest
        out.append(value * LEVELS / (LEVELS - dropped) if level >= dropped else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 2, 3), (0, 4), (16, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_it_is_what_a_loop_makes(share: float, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = dropout(x, share, generator=torch.Generator().manual_seed(2))
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), reference(x, share, 2), rtol=tolerance, atol=0)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.999])
def test_its_share_is_exact_and_its_elements_independent(share: float) -> None:
    rows, columns = 500, 2000
    zero = dropout(torch.ones(rows, columns), share, generator=torch.Generator().manual_seed(0)) == 0
    spread = (share * (1 - share) / zero.numel()) ** 0.5
    assert abs(zero.double().mean().item() - share) < 5 * spread + 0.5 / LEVELS
    both = (zero[:, 1:] & zero[:, :-1]).double().mean().item()  # neighbours come from one number
    assert abs(both - share**2) < 5 * (share**2 / zero.numel()) ** 0.5 + share / LEVELS


def test_gradients_pass_where_it_kept() -> None:
    x = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    scale = LEVELS / (LEVELS - round(0.4 * LEVELS))
    kept = (y != 0).double() * scale
    torch.testing.assert_close(gradient, 2 * x * kept**2)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 2 * kept**2)


def test_a_seed_decides_and_evaluation_leaves_x_alone() -> None:
    x = torch.randn(50, 50)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(dropout(x, 0.5))
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
