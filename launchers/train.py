"""Train a cross-modal GAN.

accelerate launch launchers/train.py --preset openmoji --data DIR --output RUN [--resume auto|never] [overrides]

Overrides: --optim.generator-lr 1e-4 or optim.generator_lr=1e-4.
Exit codes: 0 done, 2 bad input, 85 saved after a signal, or nothing to save yet.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import sys
from typing import TYPE_CHECKING

from cmgan_dist.errors import EXIT_DONE, BadInput, run_main
from cmgan_dist.jobs.startup import ended_by_signals

if TYPE_CHECKING:  # torch takes seconds to import: first come the cheap checks
    from cmgan_dist.training.run import Run


def train_and_report(run: Run) -> int:
    """Train to the end or to a signal and write the report of a run that has ended; returns the exit code."""
    from cmgan_dist.retrieval.evaluate import REPORT_NAME
    from cmgan_dist.training.loop import run_training

    before = run.progress.position
    code = run_training(run)
    page = run.folder / REPORT_NAME
    missing = before < run.total or not page.exists()
    if missing and code == EXIT_DONE and run.config.train.report and run.parallel.main:
        from cmgan_dist.report.run import write_report  # seconds to import, and only here

        print(f"report: {write_report(run.folder)}", file=sys.stderr)
    return code


def main() -> int:
    with ended_by_signals():
        return _train()


def _train() -> int:
    from cmgan_dist.config.cli import log_to_stderr, parse_arguments
    from cmgan_dist.config.load import check_places, to_yaml

    log_to_stderr()
    try:
        config, arguments = parse_arguments(sys.argv[1:])
        if arguments.dry_run:
            from cmgan_dist.data.source import public_config

            print(to_yaml(public_config(config)), end="")
            return 0
        check_places(config)
        # after the cheap checks: torch and its friends take seconds to import
        from cmgan_dist.distributed.join import start_all_processes
        from cmgan_dist.training.run import prepare

        start_all_processes()
        run = prepare(config, arguments.resume)
    except BadInput as error:
        error.everywhere = True  # every process finds the same
        raise
    return train_and_report(run)


if __name__ == "__main__":
    run_main(main)
