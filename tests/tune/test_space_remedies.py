"""What sentences on search spaces say to do leads out."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmgan_dist.config.presets import preset
from cmgan_dist.errors import BadInput
from tune.space import check_space, load_space

SPACES = [
    ("- a\n", "is not a mapping from config paths to ranges", ["loss.inter: {uniform: [0, 1]}"]),
    ("loss.intr: {uniform: [0, 1]}", r"did you mean loss\.intra\?", ["loss.intra: {uniform: [0, 1]}"]),
    ("loss.inter: []", "is an empty list: name its values", ["loss.inter: [0.5, 1]"]),
    ("loss.inter: {uniform: [1, 0]}", "expected low < high", ["loss.inter: {uniform: [0, 1]}"]),
    ("loss.inter: {log: [0, 1]}", "low > 0 for log", ["loss.inter: {log: [0.1, 1]}"]),
    ("loss.inter: {uniform: [a, 1]}", r"expected two numbers \[low, high\]", ["loss.inter: {uniform: [0, 1]}"]),
    (
        "model.common_dim: {uniform: [8, 16]}",
        "is a whole number: use int, or a list",
        ["model.common_dim: {int: [8, 16]}", "model.common_dim: [8, 16]"],
    ),
    (
        "model.common_dim: {int: [8.5, 16]}",
        "from 8.5 to 16: int takes whole numbers",
        ["model.common_dim: {int: [8, 16]}"],
    ),
    ("loss.inter: {int: [0, 2.9]}", "int takes whole numbers", ["loss.inter: {int: [0, 3]}"]),
    ("model.dropout: {uniform: [-0.5, 2]}", "expected 0 to 0.999", ["model.dropout: {uniform: [0, 0.999]}"]),
    ("loss.inter: {uniform: [true, 2]}", r"expected two numbers \[low, high\]", ["loss.inter: {uniform: [1, 2]}"]),
    ("loss.inter: {uniform: [.nan, 2]}", "loss.inter is nan", ["loss.inter: {uniform: [0, 2]}"]),
    ("optim.accumulate: {int: [1, 4]}", "optim.accumulate is 3", ["optim.accumulate: [1, 2, 4]"]),
    ("loss.adversarial: [x]", "expected one of", ["loss.adversarial: [hinge]"]),
    ("loss.inter: [x]", "expected a value like", ["loss.inter: [1.0]"]),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), SPACES)
def test_a_space(wrong: str, sentence: str, right: list[str], tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(wrong)
    with pytest.raises(BadInput, match=sentence):
        check_space(load_space(str(path)), preset("smoke"))
    for text in right:
        path.write_text(text)
        check_space(load_space(str(path)), preset("smoke"))
