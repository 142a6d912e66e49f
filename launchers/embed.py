"""Embed a data set with a trained run: vectors of every image and text, for an index or for work of your own.

python launchers/embed.py RUN --data DIR|URL --output EMB [--splits train,test]
python launchers/embed.py RUN --pictures DIR --output EMB
python launchers/embed.py RUN --texts FILE --output EMB

Exit codes: 0 done (or done with this task's part), 2 bad input.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import sys

from cmgan_dist.config.cli import log_to_stderr, parse
from cmgan_dist.errors import run_main
from cmgan_dist.retrieval.embed_options import EmbedOptions


def main() -> None:
    log_to_stderr()
    options = parse(EmbedOptions, sys.argv[1:], prog="launchers/embed.py")
    from cmgan_dist.retrieval.embed_job import embed  # torch takes seconds to import

    embed(options)


if __name__ == "__main__":
    run_main(main)
