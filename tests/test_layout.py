"""The house, as CONTRIBUTING.md describes it: imports point down only, no circles, no long files and functions."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [
    {"interrupts"},
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
SHARDS_USE = {"interrupts", "errors", "files", "config", "jobs", "data", "models"}
HELPERS = r"tests\.(toy|services(\..+)?|golden\.record|(\w+\.)?(\w+_(cases|worker)))"
"""Modules under tests/ that others may import."""
MAY_NAME = {
    "accelerate": ("cmgan_dist/distributed/",),
    "deepspeed": ("cmgan_dist/distributed/",),
    "ray": ("cmgan_dist/jobs/ray.py", "tune/", "bench/"),
    "faiss": ("cmgan_dist/retrieval/index.py", "bench/use.py"),
    "fastapi": ("cmgan_dist/retrieval/serve.py",),
    "starlette": ("cmgan_dist/retrieval/serve.py",),
}
MOST_LINES, MOST_IN_FUNCTION = 450, 60


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


def graph_of(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """File -> files of the project that it imports; packages' own ``__init__`` are left out."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in trees}
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for module in imported(tree):
            target = modules.get(module)
            if target and target != name and not target.endswith("__init__.py"):
                graph[name].add(target)
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that can be reached from `start` by one import or more."""
    seen: set[str] = set()
    rest = list(graph[start])
    while rest:
        node = rest.pop()
        if node not in seen:
            seen.add(node)
            rest += graph[node]
    return seen


def room(name: str) -> str:
    """``cmgan_dist/data/tar.py`` -> ``data``."""
    return name.split("/")[1].removesuffix(".py")


def library(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(package of cmgan_dist, module) of each import of the library."""
    for module in imported(tree):
        first, *rest = module.split(".")
        if first == "cmgan_dist" and rest and rest[0] in LEVEL:
            yield rest[0], module


def test_every_package_has_its_level() -> None:
    names = {room(name) for name in parsed("cmgan_dist")} - {"__init__"}
    assert names == LEVEL.keys()


def test_imports_point_down_only() -> None:
    for name, tree in parsed("cmgan_dist").items():
        outside = [m for m in imported(tree) if m.split(".")[0] in ("launchers", "shards", "tune", "bench", "tests")]
        assert not outside, f"{name} imports {outside}"
        if room(name) == "__init__":  # the public names, of all levels
            continue
        mine = room(name)
        for theirs, module in library(tree):
            assert mine == theirs or LEVEL[theirs] < LEVEL[mine], f"{name} imports {module}: not below it"


def test_shards_use_data_models_jobs_and_config_only() -> None:
    for name, tree in parsed("shards").items():
        for theirs, module in library(tree):
            assert theirs in SHARDS_USE, f"{name} imports {module}"


def test_imports_are_absolute() -> None:
    for name, tree in parsed(*TOPS, "bench", "tests").items():
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, f"{name} imports from . in line {relative}"


def test_no_files_import_each_other() -> None:
    graph = graph_of(parsed(*TOPS))
    circles = sorted(name for name in graph if name in reachable(graph, name))
    assert not circles


@pytest.mark.parametrize("package", MAY_NAME)
def test_a_package_is_named_where_it_may_be_only(package: str) -> None:
    for name, tree in parsed(*TOPS, "bench").items():
        if any(module.split(".")[0] == package for module in imported(tree)):
            assert name.startswith(MAY_NAME[package]), f"{name} names {package}"


def test_models_kernels_and_losses_do_not_know_of_processes() -> None:
    for name, tree in parsed("cmgan_dist").items():
        if room(name) in ("models", "kernels") or name == "cmgan_dist/training/losses.py":
            assert "cmgan_dist.distributed" not in {".".join(m.split(".")[:2]) for m in imported(tree)}, name


def test_training_does_not_know_of_reports() -> None:
    for name, tree in parsed("cmgan_dist/training").items():
        assert not [module for module in imported(tree) if module.startswith("cmgan_dist.report")], name


def test_tests_share_helpers_and_no_tests() -> None:
    """What several tests need lies in tests/toy.py, tests/services/, or *_cases.py, *_worker.py beside."""
    trees = parsed("tests")
    modules = {name.removesuffix(".py").replace("/", ".") for name in trees}
    for name, tree in trees.items():
        for module in set(imported(tree)) & modules:
            assert re.fullmatch(HELPERS, module), f"{name} imports {module}"


def test_files_and_functions_are_short() -> None:
    long = defaultdict(list)
    for name, tree in parsed(*TOPS, "bench").items():
        lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
        if lines > MOST_LINES:
            long[name].append(f"{lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_IN_FUNCTION:
                    long[name].append(f"{node.name} has {length} lines")
    assert not long


def test_contributing_names_every_file() -> None:
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in parsed(*TOPS):
        assert Path(name).name in said or name.startswith("shards/sources/") or name.endswith("__init__.py"), name
