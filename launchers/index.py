"""Make an index of embeddings, add to it, or remove from it.

python launchers/index.py EMB --output INDEX [--kind auto|exact|ivf_sq8]
python launchers/index.py INDEX --add EMB
python launchers/index.py INDEX --remove KEY ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cmgan_dist.config.cli import log_to_stderr, parse
from cmgan_dist.errors import BadInput, run_main


@dataclass
class Arguments:
    """Index embeddings that launchers/embed.py made; --add and --remove change an index, each in one step."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder or URL of embeddings; with --add or --remove the index."""
    output: str = ""
    """Folder of the index; one that is there is replaced when the new one is whole."""
    kind: Literal["auto", "exact", "ivf_sq8"] = "auto"
    """exact compares with every vector; ivf_sq8 with those in cells near the query, a byte a dimension; auto is exact
    up to 100,000 vectors."""
    add: str = ""
    """Folder or URL of embeddings of the same model that are added."""
    remove: tuple[str, ...] = ()
    """Keys whose items, images and texts, are removed."""


def main() -> None:
    log_to_stderr()
    arguments = parse(Arguments, sys.argv[1:], prog="launchers/index.py")
    asked = [bool(arguments.output), bool(arguments.add), bool(arguments.remove)]
    if sum(asked) != 1:
        what = "none" if not any(asked) else "more than one"
        raise BadInput(f"{what} of --output, --add and --remove is given: give one, see launchers/index.py --help")
    from cmgan_dist.retrieval.index import Index
    from cmgan_dist.retrieval.index_build import TARGET

    if arguments.output:
        index = Index.build(arguments.source, arguments.output, kind=arguments.kind, progress=True)
    else:
        index = Index.open(arguments.source)
        if arguments.add:
            print(f"added: {index.add(arguments.add, progress=True)}")
        else:
            print(f"removed: {index.remove(arguments.remove)}")
    manifest, (mean, std) = index.manifest, index.chance
    cells = f", {manifest.nprobe} cells a query" if manifest.nprobe else ""
    print(f"{index.folder}: {len(index)} vectors of {index.dim} numbers, {manifest.kind}{cells}")
    hint = "" if manifest.recall >= TARGET else " (--kind exact finds all, in 10 ms for each 100,000 vectors)"
    print(f"recall@10 {manifest.recall:.3f}{hint}, cosine by chance {mean:.3f} ± {std:.3f}")


if __name__ == "__main__":
    run_main(main)
