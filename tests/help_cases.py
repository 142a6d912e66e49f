"""What a program prints for --help, in a process of its own that must not import what takes seconds to import."""

from __future__ import annotations

import subprocess
import sys

from tests.toy import ROOT, environment

HEAVY = "accelerate datasets deepspeed faiss matplotlib pandas ray scipy sentence_transformers sklearn timm torch"
CODE = f"""
import runpy, sys
name, *words = sys.argv[1:]
sys.argv = [name, *words, "--help"]
try:
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
finally:
    print("heavy:", sorted(set({HEAVY.split()!r}) & set(sys.modules)))
"""


def help_of(words: str) -> str:
    """Return the help of a program, a file or a module with words after it, which must have imported nothing heavy."""
    command = [sys.executable, "-c", CODE, *words.split()]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    shown, _, heavy = done.stdout.rpartition("heavy: ")
    assert heavy == "[]\n"
    return shown
