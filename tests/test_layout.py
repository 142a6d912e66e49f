"""The house, as CONTRIBUTING.md describes it: imports point down only, no circles, no long files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [
    {"errors", "files"},
    {"config", "jobs", "kernels"},
    {"data", "distributed"},
    {"models"},
    {"retrieval"},
    {"training"},
    {"report"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TOPS = ("cmgan_dist", "launchers", "shards", "tune")


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parsed(*tops: str) -> dict[str, ast.Module]:
    """Every Python file under `tops`, by its path from the root."""
    files = [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def room(name: str) -> str:
    """``cmgan_dist/data/tar.py`` -> ``data``."""
    return name.split("/")[1].removesuffix(".py")


def test_imports_point_down_only() -> None:
    for name, tree in parsed("cmgan_dist").items():
        for module in imported(tree):
            first, *rest = module.split(".")
            assert first not in ("launchers", "shards", "tune", "bench"), f"{name} imports {module}"
            if first == "cmgan_dist" and rest and rest[0] in LEVEL and room(name) in LEVEL:
                mine, theirs = room(name), rest[0]
                assert mine == theirs or LEVEL[theirs] < LEVEL[mine], f"{name} imports {module}: not below it"
