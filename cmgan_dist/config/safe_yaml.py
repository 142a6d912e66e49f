"""YAML files by a user: read with limits on size, every fault of theirs one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cmgan_dist.errors import BadInput
from cmgan_dist.files import NotRegular, open_once

MOST_BYTES = 1 << 20
"""Largest YAML file that is read; a config that names every setting has 4 kB."""
MOST_VALUES = 100_000
"""Most values in a YAML text, each counted as often as aliases repeat it."""
MOST_DIGITS = 1000
"""Longest number; the time to read one grows with the square of its length."""
OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9_.]+(:[0-9_.]+)+)")
"""Numbers that YAML 1.1 reads by base 8 or 60, and hardly anyone means so: 010 and 1:30."""


def read_text(path: Path, where: str) -> str:
    """Return the text of a file that a user names; `where` names it in errors.

    Raises BadInput when it is missing, no file, too large, not UTF-8 or cannot be read."""
    try:
        with open_once(path) as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"{where} does not exist: check the path") from None
    except NotRegular:
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise BadInput(f"{where} is {what}: name a YAML file") from None
    except OSError as error:
        raise BadInput(f"{where} cannot be read ({error.strerror}): check the path and its permissions") from None
    if len(data) > MOST_BYTES:
        raise BadInput(f"{where} is larger than {MOST_BYTES >> 20} MiB: name a YAML file of settings")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def shown_value(value: object) -> str:
    """Return a value as errors show it: in one line, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says, None for an empty one; `where` names it in errors.

    Raises BadInput when it is not YAML or when its aliases and merges make more than MOST_VALUES values of it."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        fits = _count(root, {}) <= MOST_VALUES
        doubled = _twice(root) if fits else None
        if fits and doubled is None:
            return loader.construct_document(root)
    except RecursionError:
        raise BadInput(f"{where} is nested too deeply: write settings only") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where} is not YAML ({' '.join(str(error).split())}): mend it") from None
    except (ValueError, KeyError, AttributeError) as error:  # PyYAML on 2026-99-99, !!bool x, !!timestamp x
        raise BadInput(f"{where} has a value that is not of its type ({error}): mend it") from None
    if doubled is not None:
        raise BadInput(f"{where} has {shown_value(doubled)} twice in one place: keep one of them")
    raise BadInput(f"{where} holds more than {MOST_VALUES} values, aliases written out: keep to the settings")


def _twice(node: yaml.Node) -> str | None:
    """Return a key that stands twice in one mapping, in `node` or below it, None where there is none."""
    seen = set[str]()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            return str(key.value)
        if isinstance(key, yaml.ScalarNode):
            seen.add(key.value)
    return next((found for part in _parts(node) if (found := _twice(part)) is not None), None)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes in a node: keys and values of a mapping, items of a sequence."""
    parts = getattr(node, "value", None)
    found = parts if isinstance(parts, list) else []
    return [part for item in found for part in (item if isinstance(item, tuple) else (item,))]


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the values below `node`, each as often as aliases repeat it; a node inside itself counts as too many."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1
        below = getattr(node, "value", None)
        if isinstance(below, str) and node.tag.endswith((":int", ":float")):
            if len(below) > MOST_DIGITS:
                raise ValueError(f"a number of {len(below)} characters")
            if OTHER_BASE.fullmatch(below):
                raise ValueError(f"{below}, which YAML 1.1 reads by another base than ten")
        known[id(node)] = 1 + sum(_count(part, known) for part in _parts(node))
    return known[id(node)]
