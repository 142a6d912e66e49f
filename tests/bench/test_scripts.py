"""Every benchmark starts as its docstring says."""

from __future__ import annotations

import ast

import pytest

from tests.help_cases import help_of
from tests.toy import ROOT

FILES = sorted((ROOT / "bench").rglob("*.py"))
SCRIPTS = {
    path.stem if path.parent.name == "bench" else path.parent.name: path
    for path in FILES
    if '"__main__"' in path.read_text(encoding="utf-8")
}
"""Name of a script, or of a package with a ``__main__.py`` -> its file."""


@pytest.mark.process
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_its_options_and_imports_nothing_heavy_for_them(name: str) -> None:
    usage, _, options = help_of(f"bench.{name}").partition("\n")
    assert name in usage
    assert "--" in options


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_docstring_names_the_command(name: str) -> None:
    doc = ast.get_docstring(ast.parse(SCRIPTS[name].read_text(encoding="utf-8")))
    assert doc
    assert f"python -m bench.{name} " in doc


def test_no_file_starts_another_way() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "python bench/" not in text, path
        assert "sys.path" not in text, path
