"""Run the unit tests of what has changed, in under a minute: python -m tests.quick [--list]

Changed is what differs from the branch `main` at the point where this one left it, committed or not, and what git does
not know yet. ``cmgan_dist/data/tar.py`` leads to tests/data, ``tests/data/test_order.py`` too; tests/test_layout.py
always runs. Tests that are slow, start processes or need a GPU or SLURM are left to `make test` and the others.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARKS = "not slow and not gpu and not slurm and not process"


def git(*words: str) -> list[str]:
    """Return the lines that a git command prints, none where it fails."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed() -> list[str]:
    """Return the changed files, relative to the root; where there is no `main`, those that differ from HEAD."""
    base = git("merge-base", "HEAD", "main") or git("merge-base", "HEAD", "origin/main") or ["HEAD"]
    return git("diff", "--name-only", "--diff-filter=d", base[0]) + git("ls-files", "--others", "--exclude-standard")


def folder_of(name: str) -> str:
    """Return the folder of tests for a file; "" where there is none.

    >>> folder_of("cmgan_dist/data/tar.py")
    'tests/data'
    >>> folder_of("cmgan_dist/files.py")
    'tests'
    """
    first, *rest = PurePosixPath(name).parts
    if len(rest) < 1 + (first == "cmgan_dist") and first in ("cmgan_dist", "tests"):  # files.py, test_api.py, toy.py
        return "tests"
    package = rest[0] if first in ("cmgan_dist", "tests") and len(rest) > 1 else first
    folder = f"tests/{package}"
    return folder if (ROOT / folder).is_dir() and package not in ("tests", "slurm", "gpu", "golden", "services") else ""


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    folders = sorted({folder for name in changed() if (folder := folder_of(name))})
    print("tests of", ", ".join(folders) or "the layout alone")
    if "--list" in sys.argv:
        return 0
    if not folders:
        return pytest.main(["tests/test_layout.py"])
    if "tests" in folders:  # what all tests lean on
        folders = ["tests"]
    return pytest.main(["-n", "2", "--dist", "worksteal", "-m", MARKS, "tests/test_layout.py", *folders])


if __name__ == "__main__":
    sys.exit(main())
