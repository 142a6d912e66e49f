"""Programs that have several commands, ``cmgan`` and ``python -m shards``: choice of one, and what it calls itself.

Nothing heavy is imported here, so that a list of commands is there at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cmgan_dist.errors import BadInput

_names: dict[str, str] = {}


def choose(choices: Iterable[str], args: Sequence[str], what: str = "command") -> str:
    """Return the first of `args`. Raises BadInput when it is none of `choices`; `what` is what is chosen."""
    choices = list(choices)
    if not args:
        raise BadInput(f"name a {what}: {', '.join(choices)}")
    if args[0] not in choices:
        raise BadInput(f"unknown {what} '{args[0]}': choose one of {', '.join(choices)}")
    return args[0]


def call_as(own: str, name: str) -> None:
    """From now on a program that is `own` by itself, such as "launchers/train.py", is called `name`."""
    _names[own] = name


def program_name(name: str) -> str:
    """Return a program's name for usage and hints, such as "launchers/train.py", as the user has called it."""
    for own, called in _names.items():
        if name == own or name.startswith(f"{own} "):
            return called + name.removeprefix(own)
    return name
