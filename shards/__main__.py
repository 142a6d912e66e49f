"""The command line ``python -m shards COMMAND``; ``python -m shards --help`` lists the commands."""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import importlib
import sys
from collections.abc import Sequence

from cmgan_dist.config.commands import choose, program_name
from cmgan_dist.errors import BadInput, BadSample, run_main

PROGRAM = "python -m shards"
Table = dict[str, tuple[str, str, str]]
"""Name -> (module, its command dataclass, one line of help). A module is imported when its command is called, so that
``build folder`` does not wait for torch."""

COMMANDS: Table = {
    "verify": ("shards.verify", "VerifyCommand", "check counts, checksums, labels, duplicates and every sample"),
    "stats": ("shards.stats", "StatsCommand", "print classes, sizes and caption lengths; draw a picture grid"),
    "index": ("shards.index", "IndexCommand", "write the manifest for tars made elsewhere (img2dataset output)"),
    "split": ("shards.split", "SplitCommand", "draw a split for validation or test from the training split"),
    "features": ("shards.features", "FeaturesCommand", "turn encoded shards into shards of precomputed features"),
}
SOURCES: Table = {
    "openmoji": ("shards.sources.openmoji", "OpenMojiCommand", "emoji and their names, 9 categories, CC BY-SA 4.0"),
    "flickr8k": ("shards.sources.flickr8k", "Flickr8kCommand", "photographs with five captions each, no classes"),
    "wikipedia": ("shards.sources.wikipedia", "WikipediaCommand", "precomputed features, 10 classes"),
    "folder": ("shards.sources.folder", "FolderCommand", "[split/]CLASS/NAME.jpg + NAME.txt"),
    "coco": ("shards.sources.coco", "CocoCommand", "captions_*.json and their pictures, no classes"),
    "table": (
        "shards.sources.table",
        "TableCommand",
        "CSV, TSV, JSONL, Parquet, Arrow, or a folder (Hugging Face)",
    ),
}


FILE_URL = "file://"


def _with_path(arg: str) -> str:
    """Return an argument, or the value in ``--flag=value``, with the path where it is the URL of a file on this
    machine. Raises BadInput where that names another one."""
    from shards.urls import path_of

    flag, mark, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    try:
        return flag + mark + path_of(value)
    except BadSample as error:
        raise BadInput(str(error)) from None


def usage() -> str:
    """Return the help text: a line for each source and each command."""
    lines = [
        f"usage: {program_name(PROGRAM)} COMMAND ... (each has --help)",
        "",
        "  build SOURCE --output DIR    pack raw pairs:",
    ]
    lines += [f"    build {name:<21}{text}" for name, (_, _, text) in SOURCES.items()]
    lines += [f"  {name + ' DIR':<29}{text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int | None:
    """Run the command that `args` names and return its exit code (None is 0). Raises BadInput.

    `args`: None takes those of the command line."""
    args = sys.argv[1:] if args is None else args
    if (args and args[0] in ("-h", "--help")) or list(args) in (["build", "-h"], ["build", "--help"]):
        print(usage())
        return 0
    name = choose(["build", *COMMANDS], args)
    table, prog, rest = COMMANDS, f"{PROGRAM} {name}", args[1:]
    if name == "build":
        name = choose(SOURCES, rest, "source")
        table, prog, rest = SOURCES, f"{prog} {name}", rest[1:]
    if any(FILE_URL in arg.lower() for arg in rest):
        rest = [_with_path(arg) for arg in rest]
    from cmgan_dist.config.cli import parse  # the list of commands does without it

    module, command, _ = table[name]
    code: int | None = parse(getattr(importlib.import_module(module), command), rest, prog=prog).run()
    return code


if __name__ == "__main__":
    run_main(main)
