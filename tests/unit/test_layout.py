"""Imports point down only, as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVELS = [
    {"errors"},
    {"config", "schema", "cli"},
    {"presets", "order", "imaging", "vocabulary", "losses", "metrics", "kernels"},
    {"remote", "backbones", "baselines"},
    {"stream"},
    {"networks"},
    {"discriminators", "engine"},
    {"zero"},
    {"parallel"},
    {"phases", "checkpoint", "record"},
    {"report"},
    {"embed"},
    {"train"},
]
MAY_NAME = {"accelerate": {"parallel"}, "deepspeed": {"zero"}, "ray": set[str]()}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def modules() -> dict[str, Path]:
    found = {p.stem: p for p in (ROOT / "cmgan_dist").glob("*.py") if p.stem != "__init__"}
    found |= {f"kernels/{p.stem}": p for p in (ROOT / "cmgan_dist" / "kernels").glob("*.py")}
    return found


def level(module: str) -> int:
    name = module.split("/")[0]
    return next(i for i, names in enumerate(LEVELS) if name in names)


def test_imports_point_down() -> None:
    for name, path in modules().items():
        for imported in imports(path):
            if imported.startswith("cmgan_dist."):
                below = imported.split(".")[1]
                if any(below in names for names in LEVELS):
                    same = name.split("/")[0] == below == "kernels"
                    assert same or level(below) < level(name), f"{name} imports {below}"
            assert imported.split(".")[0] not in ("launchers", "shards", "tune", "bench"), f"{name} imports {imported}"


def test_only_their_own_module_names_accelerate_deepspeed_and_ray() -> None:
    for name, path in modules().items():
        for imported in imports(path):
            allowed = MAY_NAME.get(imported.split(".")[0])
            assert allowed is None or name in allowed, f"{name} imports {imported}"


def test_networks_and_losses_do_not_know_of_processes() -> None:
    for name in ("networks", "losses", "discriminators", "backbones", "kernels/shared_layer"):
        assert not {i for i in imports(modules()[name]) if "distributed" in i or i == "cmgan_dist.parallel"}
