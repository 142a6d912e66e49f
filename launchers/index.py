"""Make an index of embeddings, add to it, or remove from it.

python launchers/index.py EMB --output INDEX [--kind auto|exact|ivf_sq8]
python launchers/index.py INDEX --add EMB
python launchers/index.py INDEX --remove KEY ...
python launchers/index.py INDEX --query-encoders [--run RUN]
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cmgan_dist.config.cli import log_to_stderr, parse
from cmgan_dist.errors import BadInput, run_main


@dataclass
class Arguments:
    """Index embeddings that launchers/embed.py made; --add and --remove change an index, each in one step."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EMB|INDEX")]
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
    query_encoders: bool = False
    """Put the run's model into the index, as ONNX: searching then needs no run and starts in a second. With --output,
    or alone for an index that is there."""
    run: str = ""
    """Run, or copy of its best/, for --query-encoders; the one that the index names when left out."""


def main() -> None:
    log_to_stderr()
    arguments = parse(Arguments, sys.argv[1:], prog="launchers/index.py")
    asked = [bool(arguments.output), bool(arguments.add), bool(arguments.remove)]
    if sum(asked) != 1 and not (arguments.query_encoders and not any(asked)):
        what = "none" if not any(asked) else "more than one"
        raise BadInput(f"{what} of --output, --add and --remove is given: give one, see launchers/index.py --help")
    if arguments.query_encoders and (arguments.add or arguments.remove):
        raise BadInput("--query-encoders goes with --output or alone: an index that has them keeps them in a change")
    from cmgan_dist.retrieval.index import Index
    from cmgan_dist.retrieval.index_build import TARGET

    if arguments.output:
        index = Index.build(arguments.source, arguments.output, kind=arguments.kind, progress=True)
    else:
        index = Index.open(arguments.source)
        if arguments.add:
            print(f"added: {index.add(arguments.add, progress=True)}")
        elif arguments.remove:
            print(f"removed: {index.remove(arguments.remove)}")
    if arguments.query_encoders:
        from cmgan_dist.retrieval.model import Model

        print("query encoders: exporting and comparing, about half a minute", file=sys.stderr)
        index.add_query_encoders(Model(index.read_model(arguments.run), "cpu"))
        print(f"query encoders: {', '.join(path.name for path in sorted(index.folder.glob('query.*.onnx')))}")
    manifest, (mean, std) = index.manifest, index.chance
    cells = f", {manifest.nprobe} cells a query" if manifest.nprobe else ""
    print(f"{index.folder}: {len(index)} vectors of {index.dim} numbers, {manifest.kind}{cells}")
    hint = "" if manifest.recall >= TARGET else " (--kind exact finds all, in 5 ms for each 100,000 vectors)"
    print(f"recall@10 {manifest.recall:.3f}{hint}, score by chance {mean:.3f} ± {std:.3f}")


if __name__ == "__main__":
    run_main(main)
