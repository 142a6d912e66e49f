"""The command ``cmgan COMMAND``, which is ``python -m launchers COMMAND`` too; ``cmgan --help`` lists the commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cmgan_dist.config.commands import call_as, choose
from cmgan_dist.errors import CALLED, run_main
from cmgan_dist.interrupts import heed

COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("launchers.train", "launchers/train.py", "train a model on a data set"),
    "evaluate": ("launchers.evaluate", "launchers/evaluate.py", "measure a run on a split: MAP, recall, baselines"),
    "embed": ("launchers.embed", "launchers/embed.py", "put a data set, pictures or texts into the common space"),
    "index": ("launchers.index", "launchers/index.py", "make embeddings searchable, add and remove items"),
    "search": ("launchers.search", "launchers/search.py", "find pictures and texts by a text or a picture"),
    "serve": ("launchers.serve", "launchers/serve.py", "a search page and a JSON API"),
    "shards": ("shards.__main__", "python -m shards", "pack, check, index and describe data sets"),
    "tune": ("tune.search", "tune/search.py", "search for loss weights and rates"),
}
"""Name -> (module with a `main` that reads sys.argv, the program's name by itself, one line of help). A module is
imported when its command is called."""


def usage() -> str:
    """Return the help text: a line for each command."""
    lines = ["usage: cmgan COMMAND ... (each has --help)", ""]
    lines += [f"  {name:<10}{text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(lines)


def main(args: Sequence[str]) -> int | None:
    """Run the command that `args` names, as its own launcher does, and return its exit code (None is 0).

    Raises BadInput."""
    if args and args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args and args[0] == "--version":
        from importlib.metadata import version  # it takes longer to import than all else here

        print(f"cmgan {version('cmgan-dist')}")
        return 0
    name = choose(COMMANDS, args)
    module, own, _ = COMMANDS[name]
    call_as(own, f"cmgan {name}")
    launcher = importlib.import_module(module)
    # the launcher's own file first, as if it had been called: torchrun starts it again by that name
    sys.argv = [str(launcher.__file__), *args[1:]]
    code: int | None = launcher.main()
    return code


def console() -> None:
    """Run ``cmgan`` with the words of the command line and exit."""
    heed()
    CALLED.update({own: f"cmgan {name}" for name, (_, own, _) in COMMANDS.items()})
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    console()
