"""No program imports for its --help what takes seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shards.__main__ import COMMANDS, SOURCES
from tests.toy import ROOT, environment

HEAVY = "accelerate datasets deepspeed faiss matplotlib pandas ray scipy sentence_transformers sklearn timm torch"
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *sorted(ROOT.glob("launchers/*.py")),
        ROOT / "launchers" / "slurm" / "node.py",
        ROOT / "tune" / "search.py",
    )
    if path.name != "__init__.py"
]
SHARDS = [f"shards {name}" for name in COMMANDS] + [f"shards build {name}" for name in SOURCES]
CODE = f"""
import runpy, sys
name, *words = sys.argv[1:]
sys.argv = [name, *words, "--help"]
try:
    (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
finally:
    print("heavy:", sorted(set({HEAVY.split()!r}) & set(sys.modules)))
"""


@pytest.mark.process
@pytest.mark.parametrize("words", [*FILES, *SHARDS])
def test_help_imports_nothing_heavy(words: str) -> None:
    command = [sys.executable, "-c", CODE, *words.split()]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout or words.endswith("node.py")
    assert done.stdout.splitlines()[-1] == "heavy: []"
