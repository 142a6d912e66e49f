"""Serve a page and a JSON API over an index.

python launchers/serve.py INDEX [--run RUN] [--data RAW_SHARDS] [--host 127.0.0.1] [--port 8000]
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cmgan_dist.config.cli import log_to_stderr, parse
from cmgan_dist.errors import run_main

IMAGE_SIZE = 224
"""Side in pixels of what a backbone sees, where it does not say."""


@dataclass
class Arguments:
    """Serve a search page and a JSON API over INDEX until Ctrl-C or SIGTERM; a change of INDEX is served at once."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder of the index."""
    run: str = ""
    """Run, or copy of its best/, whose model encodes queries; the one that the index names when left out."""
    data: str = ""
    """Raw shards that pictures come from; those that were embedded when left out and still there."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines ask."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which browsers ask, as those of a proxy; while only this machine can ask, no other is
    answered than localhost and these."""
    title: str = ""
    """Name of the page; that of the index's folder when left out."""


def main() -> None:
    log_to_stderr()
    arguments = parse(Arguments, sys.argv[1:], prog="launchers/serve.py")
    # after the cheap checks: torch and its friends take seconds to import
    from cmgan_dist.jobs.cores import take_threads
    from cmgan_dist.retrieval.connections import hosts_of, listen
    from cmgan_dist.retrieval.index import Index
    from cmgan_dist.retrieval.model import Model
    from cmgan_dist.retrieval.pictures import pictures_by_source
    from cmgan_dist.retrieval.renewal import Renewal
    from cmgan_dist.retrieval.serve import build_app, serve
    from cmgan_dist.retrieval.upload_decoder import Decoder

    renewal = Renewal(arguments.index, arguments.data)
    index = Index.open(arguments.index)
    saved = index.read_model(arguments.run)
    pictures_of = pictures_by_source(index, arguments.data)
    if pictures_of(int(index.items.ids[0])) is None:
        print("the raw pictures are not here: the page shows texts and keys alone (--data names them)", file=sys.stderr)
    take_threads(1)
    title = arguments.title or arguments.index.resolve().name
    decoder = Decoder(saved.spec.image.image_size or IMAGE_SIZE)
    with listen(arguments.host, arguments.port) as listening:
        host, port = listening.getsockname()[:2]
        hosts = hosts_of(host, (arguments.host, *arguments.allowed_hosts))
        app = build_app(
            index,
            Model(saved),
            pictures_of,
            decoder,
            title=title,
            attribution=index.manifest.attribution,
            renewal=renewal,
            hosts=hosts,
        )
        decoder.start()
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        serve(app, listening)


if __name__ == "__main__":
    run_main(main)
