"""Small searches: their arguments, and what they have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune.options import Arguments

OBJECT_STORE = 80 * 2**20
RATES = "optim.generator_lr: {log: [5e-4, 5e-3]}\nloss.inter: {log: [0.1, 1.0]}\nmodel.dropout: {uniform: [0, 0.5]}\n"


def arguments(tmp_path: Path, data: Path, address: str, space: str = RATES, **more: Any) -> Arguments:
    file = tmp_path / "space.yaml"
    file.write_text(space)
    fields: dict[str, Any] = {"preset": "smoke", "data": str(data), "output": str(tmp_path / "search"), "trials": 2}
    fields |= {"epochs": 3.0, "val_every": 1.0, "reduction": 2, "space": str(file), "address": address}
    return Arguments(**fields | more)


def read(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "trials.json").read_text())
    return found
