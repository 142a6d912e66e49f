"""Starts the processes of a run as torchrun does, with torchrun's options, and ends quietly: with the exit code of the
process that failed first, which has said why, in place of a traceback of its own.

python -m cmgan_dist.distributed.launch --standalone --nproc_per_node 2 launchers/train.py ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cmgan_dist.errors import EXIT_LOST


def main(words: Sequence[str]) -> int:
    """Start the processes that torchrun's command line `words` asks for and return the exit code of the first that
    failed (EXIT_LOST where a signal ended it), or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would repeat which one failed
    try:
        run.run(run.parse_args(list(words)))
    except ChildFailedError as error:
        failures = error.failures
        rank = min(failures, key=lambda rank: (_ended_by_launcher(failures[rank]), failures[rank].timestamp))
        first = failures[rank]
        if first.exitcode < 0:
            print(f"error: process {rank} was ended by {first.signal_name()}: start again to go on", file=sys.stderr)
            return EXIT_LOST
        if rank and os.path.isfile(first.error_file) and not (0 in failures and os.path.isfile(failures[0].error_file)):
            print(first.message, file=sys.stderr)  # the first process says what all find, but was ended before
        return first.exitcode
    return 0


def _ended_by_launcher(failure: ProcessFailure) -> bool:
    """Return whether this is how torchrun ends the others when a process has failed."""
    return failure.exitcode == -signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
