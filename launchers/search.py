"""Search an index by a text or a picture.

python launchers/search.py INDEX "a red heart" [-k 10] [--modality image|text] [--classes a,b] [--run RUN] [--json]
python launchers/search.py INDEX --image FILE
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cmgan_dist.config.cli import parse
from cmgan_dist.errors import BadInput, run_main
from cmgan_dist.retrieval.chance import above_chance, is_near
from cmgan_dist.retrieval.index_items import chosen_classes
from cmgan_dist.retrieval.query_encoder import QueryEncoder, missing_packages

if TYPE_CHECKING:
    import numpy as np

    from cmgan_dist.retrieval.index import Hit, Index

WIDE = 200
"""Columns of a table that goes to a file or a pipe."""
JOINERS = "\u200d"
"""Not printable by itself, and part of many emoji."""


@dataclass
class Arguments:
    """Print the items of an index that lie nearest to a text or a picture."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder of the index."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ""
    """Text to search by."""
    image: str = ""
    """Picture to search by: a JPEG, PNG or WebP file."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of items."""
    modality: Literal["", "image", "text"] = ""
    """Only images, or only texts."""
    classes: str = ""
    """Only items of one of these classes, separated by commas; a single class may have commas in its name."""
    run: str = ""
    """Run, or copy of its best/ folder, whose model encodes the query; the index's own query encoders when left
    out, or the run that the index names."""
    json: bool = False
    """Print JSON on stdout instead of a table."""


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="launchers/search.py")
    if bool(arguments.text.strip()) == bool(arguments.image):
        raise BadInput("give a text or --image FILE to search by, one of them: see launchers/search.py --help")
    if arguments.k < 1:
        raise BadInput(f"-k is {arguments.k}: it must be at least 1")
    from cmgan_dist.retrieval.index import Index

    index = Index.open(arguments.index)
    classes = chosen_classes([arguments.classes], index.classes)
    modality = arguments.modality or None
    hits = index.search(encode(index, arguments), arguments.k, modality=modality, classes=classes)[0]
    if arguments.json:
        print(json.dumps(record_of(index, hits)))  # ASCII: no control character reaches a terminal
    else:
        show(index, hits)


def encode(index: Index, arguments: Arguments) -> np.ndarray:
    """Return the query's vector [1, E]. Raises BadInput when the index's model is not there, or cannot encode it."""
    exported = None if arguments.run else index.query_encoder("image" if arguments.image else "text")
    if exported is not None:
        missing = missing_packages()
        if not missing:
            encoder = QueryEncoder(exported)
            return encoder.encode_image(arguments.image) if arguments.image else encoder.encode_text(arguments.text)
        print(f"{exported} is not used, it needs {missing[0]}: pip install 'cmgan-dist[use]'", file=sys.stderr)
    # after the cheap checks: torch and its friends take seconds to import
    from cmgan_dist.jobs.cores import take_threads
    from cmgan_dist.retrieval.model import Model

    take_threads(1)
    model = Model(index.read_model(arguments.run))
    return model.encode_images(arguments.image) if arguments.image else model.encode_texts(arguments.text)


def record_of(index: Index, hits: list[Hit]) -> dict[str, Any]:
    """Return what --json prints."""
    mean, std = index.chance
    found = [
        {"rank": rank, "above_chance": above_chance(hit.score, index.chance), **asdict(hit)}
        for rank, hit in enumerate(hits, 1)
    ]
    return {"chance": {"mean": mean, "std": std}, "near": index.near, "recall": index.manifest.recall, "hits": found}


def printable(text: str) -> str:
    """Return a text as a terminal may show it: control characters, and others that cannot be seen, as escapes."""
    spaced = " ".join(text.split())
    return "".join(c if c.isprintable() or c in JOINERS else ascii(c)[1:-1] for c in spaced)


def show(index: Index, hits: list[Hit]) -> None:
    """Print a table of the hits, and say so when the best is no better than chance would give."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("#", "score", "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("", "key", "caption", "classes"):
        table.add_column(name, overflow="ellipsis", no_wrap=name == "")
    for rank, hit in enumerate(hits, 1):
        words = (hit.modality, hit.key, " / ".join(hit.texts), ", ".join(hit.labels))
        above = above_chance(hit.score, index.chance)
        figures = (str(rank), f"{hit.score:.3f}", "" if above is None else f"{above:+.1f} sd")
        table.add_row(*figures, *(Text(printable(word)) for word in words))
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    if not hits:
        print("no item fits --modality and --classes", file=sys.stderr)
    elif not is_near(hits, index.near):
        print(f"nothing is near: 9 in 10 items of the index find others at {index.near:.3f} or more", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
