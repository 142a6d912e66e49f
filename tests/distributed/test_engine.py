"""Engines: loss scalers apart, steps left out where something is not finite, clipping, state there and back."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from cmgan_dist.distributed.engine import FIRST_SCALE, AdamSettings, Engine
from cmgan_dist.training.phases import phase_table, run_phase
from cmgan_dist.training.step import build_step_inputs
from tests.toy import environment, make_batch, set_up, small

CPU = torch.device("cpu")


def engine_of(module: nn.Module, **fields: object) -> Engine:
    settings = AdamSettings(lr=0.1, beta1=0.5, beta2=0.999, **fields)  # type: ignore[arg-type]
    return Engine(module, {"": module}, settings, CPU)


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_an_overflow_in_one_discriminator_skips_only_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 autocast; the gradient of D_CI is made to overflow as a too large loss scale makes it."""
    config = small(mismatch="conditional")
    config.train.precision = "fp16"
    networks, parallel = set_up(config)
    parallel.precision = "fp16"
    assert all(e.scaler is not None for e in networks.engines.values())
    assert len({id(e.scaler) for e in networks.engines.values()}) == len(networks.engines) == 6
    networks.unwrapped["d_image_inter"].out.weight.register_hook(lambda g: torch.full_like(g, math.inf))  # type: ignore[operator, union-attr]
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    modules = {"generator": networks.generator, **networks.unwrapped}
    for phase in phase_table(config)[:6]:
        before = parameters(modules[phase.module])
        terms = run_phase(phase, [inputs], networks.engines, parallel.autocast)
        changed = any(not torch.equal(a, b) for a, b in zip(before, parameters(modules[phase.module]), strict=True))
        skipped = phase.module == "d_image_inter"
        assert changed != skipped
        assert terms[f"skipped/{phase.name}"] == float(skipped)
        assert terms[f"scale/{phase.name}"] == FIRST_SCALE * (0.5 if skipped else 1)
        assert torch.isfinite(torch.stack([v for k, v in terms.items() if k.startswith("loss/")])).all()


def test_fp16_trains_as_fp32_does_within_its_precision() -> None:
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        config = small()
        config.train.precision = precision  # type: ignore[assignment]
        networks, parallel = set_up(config)
        parallel.precision = precision
        for step in range(5):
            inputs = build_step_inputs(make_batch(seed=step), networks, config, parallel, step * 10)
            terms: dict[str, Tensor] = {}
            for phase in phase_table(config):
                terms |= run_phase(phase, [inputs], networks.engines, parallel.autocast)
        losses[precision] = {k: float(v) for k, v in terms.items() if k.startswith("loss/")}
    for name, value in losses["fp32"].items():
        assert abs(losses["fp16"][name] - value) < 0.1 * max(1, abs(value)), name
        assert abs(losses["bf16"][name] - value) < 0.3 * max(1, abs(value)), name
    assert losses["fp16"] != losses["fp32"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(bad: float, where: str) -> None:
    """`gradient`: the loss is finite here, as on a process that receives another's NaN by the all-reduce."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    engine = engine_of(module)
    module(torch.ones(2, 3)).sum().backward()
    engine.step(torch.tensor(1.0), measure=False)
    before, state = parameters(module), {k: v.clone() for k, v in engine.state().items()}
    engine.zero_grad()
    module(torch.ones(2, 3)).sum().backward()
    if where == "gradient":
        for p in module.parameters():
            assert p.grad is not None
            p.grad.fill_(bad)
    engine.step(torch.tensor(bad if where == "loss" else 1.0), measure=True)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(module), strict=True))
    assert all(torch.equal(v, state[k]) for k, v in engine.state().items())
    engine.zero_grad()
    module(torch.ones(2, 3)).sum().backward()
    engine.step(torch.tensor(1.0), measure=False)
    assert not torch.equal(before[0], parameters(module)[0])


def test_clipping_and_steps_are_those_of_plain_torch() -> None:
    module = nn.Linear(3, 2)
    twin = copy.deepcopy(module)
    engine = engine_of(module, clip=0.5, weight_decay=0.01)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=(0.5, 0.999), weight_decay=0.01)
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        engine.zero_grad()
        loss = module(x).square().sum()
        engine.backward(loss)
        found = engine.step(loss, measure=False)
        optimizer.zero_grad()
        twin(x).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        torch.testing.assert_close(found["gradient_norm"], norm)
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_state_there_and_back_goes_on_bitwise() -> None:
    def steps(module: nn.Module, engine: Engine, first: int, stop: int) -> None:
        for step in range(first, stop):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            engine.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = module(x).float().square().sum()
            engine.backward(loss)
            engine.step(loss, measure=False)

    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    engine = engine_of(module, fp16=True)
    assert engine.state() == {}
    steps(module, engine, 0, 3)
    twin = copy.deepcopy(module)
    other = engine_of(twin, fp16=True)
    other.load({k: v.clone() for k, v in engine.state().items()})
    steps(module, engine, 3, 6)
    steps(twin, other, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(v, other.state()[k]) for k, v in engine.state().items())


STEP = """
import sys, torch
from cmgan_dist.distributed.engine import AdamSettings, adamw
x = torch.nn.Parameter(torch.arange(3.0))
optimiser = adamw([x], AdamSettings(0.1, 0.9, 0.999, weight_decay=0.2))
for _ in range(3):
    optimiser.zero_grad()
    (x**3).sum().backward()
    optimiser.step()
print("torch._dynamo" in sys.modules, x.tolist())
"""


@pytest.mark.process
def test_a_step_does_not_import_the_compiler_and_is_that_of_torch() -> None:
    x = torch.nn.Parameter(torch.arange(3.0))
    optimiser = torch.optim.AdamW([x], lr=0.1, betas=(0.9, 0.999), weight_decay=0.2, fused=True)
    for _ in range(3):
        optimiser.zero_grad()
        (x**3).sum().backward()
        optimiser.step()
    done = subprocess.run([sys.executable, "-c", STEP], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"False {x.tolist()}"
