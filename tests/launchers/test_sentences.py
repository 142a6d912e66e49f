"""What sentences of errors name is there: flags, fields, commands, files and extras, in every sentence of the program.

tests/launchers/test_remedies.py follows some of the remedies to their end."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest

from cmgan_dist import errors
from cmgan_dist.config.fields import Config
from cmgan_dist.config.paths import settings
from launchers.__main__ import COMMANDS
from shards import __main__ as shards
from tests.toy import ROOT

ROOMS = ("cmgan_dist", "shards", "tune", "launchers")
OF_LAUNCHERS = {
    "--nproc_per_node",
    "--config_file",
    "--nodes",
    "--accelerate-config",
    "--ntasks-per-node",
    "--rdzv-endpoint",
    "--master_addr",
    "--master_port",
}
"""Flags of torchrun, accelerate, sbatch and our SLURM launcher."""
SECTIONS = {name for name in Config.__dataclass_fields__ if name not in ("data", "output")}
RAISED = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}


def parts(node: ast.AST) -> str:
    """The text of an expression, "{}" for what is filled in; of a choice both."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(parts, values))
        case ast.FormattedValue(value=ast.IfExp() as choice):
            return parts(choice)
        case ast.FormattedValue():
            return "{}"
        case ast.BinOp(left=left, right=right):
            return parts(left) + parts(right)
        case ast.IfExp(body=body, orelse=other):
            return f"{parts(body)} {parts(other)}"
    return ""


def kinds() -> set[str]:
    """The errors that are told as a sentence, and those made of them."""
    found = {"BadInput", "BadSample", "LostProcess"} & RAISED
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and found & {ast.unparse(base) for base in node.bases}:
                    found.add(node.name)
    return found


def sentences() -> Iterator[tuple[str, str]]:
    """Each sentence of an error, and where it stands."""
    names = kinds()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] in names:
                    yield parts(node.args[0]), f"{path.relative_to(ROOT)}:{node.lineno}"


SENTENCES = list(sentences())


def missing(pattern: str, is_there: Callable[[str], bool]) -> list[str]:
    """What sentences name by `pattern` and is not there, with the place of the sentence."""
    found = [(name, place) for text, place in SENTENCES for name in re.findall(pattern, text)]
    assert len(found) > 3
    return [f"{name}: {place}" for name, place in found if not is_there(name)]


def help_of(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints of its options: with or without an end of the program."""
    with contextlib.suppress(SystemExit):
        main()
    return capsys.readouterr().out


def test_flags_are_those_of_some_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = ""
    for module, program, _ in COMMANDS.values():
        if module != "shards.__main__":
            monkeypatch.setattr(sys, "argv", [program, "--help"])
            text += help_of(importlib.import_module(module).main, capsys)
    for words in [*[[name] for name in shards.COMMANDS], *[["build", name] for name in shards.SOURCES]]:
        text += help_of(lambda words=words: shards.main([*words, "--help"]), capsys)
    flags = set(re.findall(r"--[a-z][\w.-]*", text.replace("_", "-"))) | OF_LAUNCHERS | {"--help"}
    assert len(flags) > 100
    assert not missing(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", lambda flag: flag in flags or f"{flag}." in text)


def test_fields_are_those_of_the_config() -> None:
    def is_there(name: str) -> bool:
        if name.endswith(".py"):
            return True
        return any(each == name or each.startswith(f"{name}.") for each in settings())

    pattern = rf"(?<![\w/-])(?:{'|'.join(sorted(SECTIONS))})\.[a-z_]+(?:\.[a-z_0-9]+)*"
    assert not missing(pattern, is_there)


def test_commands_files_and_extras_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    words = {"build", *shards.COMMANDS}
    assert not missing(r"python -m shards ([a-z]+)", lambda name: name in words)
    assert not missing(r"(?:launchers|tune|docs)/[\w/]+(?:\.\w+)?", lambda name: (ROOT / name.rstrip("/")).exists())
    assert not missing(r"cmgan-dist\[(\w+)\]", lambda name: name in extras)


def test_none_names_a_field_where_a_command_has_none() -> None:
    """Sentences of shards/ are read by users of commands without a config."""
    fields = rf"(?<![\w/-])(?:{'|'.join(sorted(SECTIONS))})\.(?!py\b|json\b)[a-z_]+"
    own = [(text, place) for text, place in SENTENCES if place.startswith("shards/")]
    assert len(own) > 100
    assert not [f"{text}: {place}" for text, place in own if re.search(fields, text)]
