"""Starts the processes of a run as torchrun does, with torchrun's options, and ends quietly: with the exit code of the
process that failed first, which has said why, in place of a traceback of its own.

python -m cmgan_dist.distributed.launch --standalone --nproc_per_node 2 launchers/train.py ...
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from cmgan_dist.errors import EXIT_LOST


def main(words: Sequence[str]) -> int:
    """Start the processes that torchrun's command line `words` asks for and return the exit code of the first that
    failed (EXIT_LOST where a signal ended it), or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would repeat which one failed
    try:
        run.run(run.parse_args(list(words)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            if 0 not in error.failures and failure.error_file_data["message"]:  # the first process has not said it
                print(failure.message, file=sys.stderr)
            return failure.exitcode
        print(f"error: process {rank} was ended by {failure.signal_name()}: start again to go on", file=sys.stderr)
        return EXIT_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
