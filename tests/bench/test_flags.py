"""A number that a benchmark cannot take is one sentence that names its flag, before any work."""

from __future__ import annotations

import importlib
import math
import sys

import pytest

from cmgan_dist.config.paths import Setting, walk
from cmgan_dist.errors import BadInput
from tests.bench.script_cases import SCRIPTS

NEEDED = {
    "ablation": ["--data", "nowhere"],
    "encode": ["--run", "nowhere", "--data", "nowhere"],
    "rivals": ["--data", "nowhere"],
    "search": ["--data", "nowhere"],
    "stream": ["--data", "nowhere"],
    "wait": ["nowhere"],
}
"""What a script must be given beside its flags."""
BEYOND_RANGES = [
    ("first_batch", "--latency-ms", "-5"),
    ("first_batch", "--streams", "0"),
    ("metrics", "--gallery", "9"),
    ("metrics", "--whole", "-5"),
    ("step", "--scale", "1"),
    ("step", "--seconds", "nan"),
    ("stream", "--images", "127"),
    ("use", "--counts", ""),
    ("zero", "--processes", "3"),
]


def module_of(name: str) -> str:
    return f"bench.{name}.__main__" if SCRIPTS[name].name == "__main__.py" else f"bench.{name}"


def numbers(name: str) -> list[tuple[str, Setting]]:
    """Return the numeric flags of a script."""
    cls = importlib.import_module(module_of(name)).Arguments
    return [(f"--{path.replace('_', '-')}", setting) for path, setting in walk(cls) if setting.number]


FLAGS = [(name, flag, setting) for name in SCRIPTS for flag, setting in numbers(name)]


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, flag: str, value: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *NEEDED.get(name, []), flag, *value.split()])
    with pytest.raises(BadInput) as refused:
        importlib.import_module(module_of(name)).main()
    return str(refused.value)


@pytest.mark.parametrize(("name", "flag", "setting"), FLAGS, ids=[f"{name} {flag}" for name, flag, _ in FLAGS])
def test_every_number_has_a_range_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, name: str, flag: str, setting: Setting
) -> None:
    assert setting.range is not None, f"{flag} takes any number"
    for value in (math.floor(setting.range.low) - 1, math.ceil(setting.range.high) + 1):
        assert refusal(monkeypatch, name, flag, f"{value}").startswith(f"{flag} ")


@pytest.mark.parametrize(("name", "flag", "value"), BEYOND_RANGES)
def test_a_number_that_would_end_in_a_traceback_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, flag: str, value: str
) -> None:
    assert refusal(monkeypatch, name, flag, value).startswith(f"{flag} ")


def test_each_script_with_numbers_is_in_the_table() -> None:
    assert {name for name, *_ in FLAGS} == set(SCRIPTS)
