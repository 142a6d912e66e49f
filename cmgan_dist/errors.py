"""The two ways in which input can be wrong. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_SIGNALLED = 85
"""Saved after SIGTERM, SIGUSR1 or Ctrl-C: start again with ``--resume auto``."""


class BadInput(ValueError):
    """Input by the user is wrong. The message is one sentence that names the file, field or flag,
    what was wrong and what to do. Launchers print it to stderr and exit with 2."""


class BadSample(ValueError):
    """One sample cannot be used. The message says why; the stream replaces the sample."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: bad input ends as one sentence on stderr and exit code 2."""
    try:
        code = main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    sys.stdout.flush()
    sys.exit(code or EXIT_DONE)
