"""No program imports for its --help what takes seconds to import."""

from __future__ import annotations

import pytest

from launchers.__main__ import COMMANDS as CMGAN
from shards.__main__ import COMMANDS, SOURCES
from tests.help_cases import help_of
from tests.toy import ROOT

FILES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *sorted(ROOT.glob("launchers/*.py")),
        ROOT / "launchers" / "slurm" / "node.py",
        ROOT / "tune" / "search.py",
    )
    if path.name != "__init__.py"
]
SHARDS = ["shards", *(f"shards {name}" for name in COMMANDS), *(f"shards build {name}" for name in SOURCES)]


@pytest.mark.process
@pytest.mark.parametrize(
    "words", [*FILES, *SHARDS, *(f"launchers {name}" for name in CMGAN), "cmgan_dist.distributed.launch"]
)
def test_help_imports_nothing_heavy(words: str) -> None:
    assert "usage: " in help_of(words) or words.endswith("node.py")
