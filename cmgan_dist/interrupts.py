"""Ctrl-C and SIGTERM, from a command's first line on. It imports nothing that takes long."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

EXIT_SIGNALLED = 85
"""Ended by SIGTERM or Ctrl-C, and training by SIGUSR1 too, with what was done saved: start again to go on."""
ENDING_S = 10.0
"""Seconds in which what is interrupted comes to its end."""
INTERRUPTED = "interrupted: what was written is whole; the same command goes on from it"


def heed() -> None:
    """End this process at once, with EXIT_SIGNALLED and a sentence, at a signal that comes before `Interruption`.

    A command calls it before all other imports: until it has run its `main`, nothing is begun."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not _is_of_a_run():
        signal.signal(signal.SIGTERM, _end)


def is_first_process() -> bool:
    """Return whether this is the process of a run that says what holds for all."""
    return os.environ.get("RANK", "0") == "0"


def _is_of_a_run() -> bool:
    """Return whether a launcher has started this process, which ends the others by SIGTERM where one has failed."""
    return "RANK" in os.environ


def _end(number: int, frame: FrameType | None) -> None:
    if is_first_process():
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(EXIT_SIGNALLED)


class Interruption:
    """What the first Ctrl-C or SIGTERM does: KeyboardInterrupt in this process, whose end the next ones do not disturb
    for ENDING_S: a library may have passed over it. A fork is ended as if there were no handler."""

    def __init__(self) -> None:
        self.process, self.seen, self._heeded_until = os.getpid(), False, 0.0
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _end) and not _is_of_a_run():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif time.monotonic() > self._heeded_until:
            self.seen, self._heeded_until = True, time.monotonic() + ENDING_S
            raise KeyboardInterrupt
