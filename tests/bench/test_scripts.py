"""Every benchmark starts as its docstring says."""

from __future__ import annotations

import ast
import runpy
import sys

import pytest

from tests.toy import ROOT

FILES = sorted((ROOT / "bench").rglob("*.py"))
SCRIPTS = {
    path.stem if path.parent.name == "bench" else path.parent.name: path
    for path in FILES
    if '"__main__"' in path.read_text(encoding="utf-8")
}
"""Name of a script, or of a package with a ``__main__.py`` -> its file."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code in (None, 0)
    usage, _, options = capsys.readouterr().out.partition("\n")
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
