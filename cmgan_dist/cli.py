"""Command lines by tyro, with dotted overrides and errors as one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler

from cmgan_dist.errors import BadInput

T = TypeVar("T")


def log_to_stderr() -> None:
    """Our own log from INFO on and everybody else's from WARNING on; stdout is for results."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("cmgan_dist").setLevel(logging.INFO)


def _flag_form(args: Sequence[str]) -> list[str]:
    """Dotted overrides in tyro's form: ``a.b_c=1`` -> ``--a.b-c=1``, ``a.b=false`` -> ``--a.no-b``, and a list
    ``a.b=1,2`` -> ``--a.b 1 2``."""
    tokens: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and "." in name and " " not in name and "/" not in name:
            arg = "--" + name.removeprefix("--").replace("_", "-") + "=" + value
            name = arg.partition("=")[0]
            if value.lower() in ("true", "false"):
                group, _, leaf = name.rpartition(".")
                arg = name if value.lower() == "true" else f"{group}.no-{leaf}"
            elif "," in value:
                tokens += [name, *value.split(",")]
                continue
        tokens.append(arg)
    return tokens


def parse(cls: type[T], args: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Parse `args` into the dataclass `cls`; ``--help`` prints and exits with 0.

    Overrides may be written ``--optim.generator-lr 1e-4`` or ``optim.generator_lr=1e-4``.
    Raises BadInput with one sentence that names the flag."""
    errors = io.StringIO()
    arguments = _flag_form(args)
    try:
        with contextlib.redirect_stderr(errors):
            if default is None:
                return tyro.cli(cls, args=arguments, prog=prog)
            return tyro.cli(cls, args=arguments, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │╭╮╰╯─") for line in errors.getvalue().splitlines()]
        text = " ".join(line for line in lines[1:] if line)
        sentence = text.split("Argument helptext:")[0].split("For full helptext")[0].strip(" ─.")
        wrong, _, close = sentence.partition(" Perhaps you meant:")
        flags = re.findall(r"--[\w.-]+", close)
        hint = f"did you mean {' or '.join(flags[:3])}? " if flags else ""
        raise BadInput(f"{wrong}: {hint}see '{prog} --help'") from None
