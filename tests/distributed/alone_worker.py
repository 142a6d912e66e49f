"""What the first process does alone takes longer than a collective waits; see test_alone.py.

torchrun --nproc_per_node 2 tests/distributed/alone_worker.py slow|silent
"""

from __future__ import annotations

import os
import signal
import sys
import time

from cmgan_dist.distributed.join import is_lost_process
from cmgan_dist.distributed.processes import Parallel

WAITED_S = 6.0


def slow(parallel: Parallel) -> None:
    def work() -> str:
        time.sleep(2 * WAITED_S)
        return "done"

    found = parallel.on_main(work)
    print(f"process {parallel.rank}: {found}", flush=True)
    parallel.close()


def silent(parallel: Parallel) -> None:
    """The first process stands still; the second one gives it up, and wakes it then."""
    first = parallel.gather_objects(os.getpid())[0]
    if not parallel.main:
        time.sleep(WAITED_S / 4)  # the first one is at work
        os.kill(first, signal.SIGSTOP)
    try:
        parallel.on_main(lambda: time.sleep(WAITED_S))
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        print(f"process {parallel.rank}: lost the other", flush=True)
    finally:
        if not parallel.main:
            os.kill(first, signal.SIGCONT)
    os._exit(0)  # no group is left that could be closed


def main() -> None:
    parallel = Parallel(timeout_s=WAITED_S)
    parallel.on_main(lambda: None)
    {"slow": slow, "silent": silent}[sys.argv[1]](parallel)


if __name__ == "__main__":
    main()
