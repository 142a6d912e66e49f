"""Every benchmark starts as its docstring says."""

from __future__ import annotations

import ast

import pytest

from tests.bench.script_cases import FILES, SCRIPTS
from tests.help_cases import help_of


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
