"""Signals that come while a program starts, when there is nothing to save yet.

A handler of Python's runs when the interpreter has its turn, which the import of a library or the wait for other
processes may keep for minutes. The byte that the kernel's signal leaves in a pipe is there at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from cmgan_dist.errors import leave_report
from cmgan_dist.interrupts import EXIT_SIGNALLED

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals by which people and schedulers end a run."""


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it a signal of NUMBERS ends the process at once with EXIT_SIGNALLED and a sentence, until `settled`.

    What is written is whole or not there whenever that happens, and locks end with the process. Handlers that were set
    within stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    out, into = os.pipe()
    os.set_blocking(into, False)
    before = {number: signal.signal(number, _leave_to_the_pipe) for number in NUMBERS}
    signal.set_wakeup_fd(into)
    threading.Thread(target=_wait, args=[out], daemon=True).start()
    try:
        yield
    finally:
        settled()
        for number, handler in before.items():
            if signal.getsignal(number) is _leave_to_the_pipe:
                signal.signal(number, handler)
        os.close(into)  # which ends the thread


def settled() -> None:
    """Leave the signals to the handlers that were set since."""
    signal.set_wakeup_fd(-1)


def _leave_to_the_pipe(number: int, frame: FrameType | None) -> None:
    """Do nothing: the byte in the pipe is what counts."""


def _wait(pipe: int) -> None:
    """End the process when the byte of one of NUMBERS comes; others, as of a child that ends, are passed over."""
    while byte := os.read(pipe, 1):
        if byte[0] in NUMBERS and signal.getsignal(byte[0]) is _leave_to_the_pipe:  # else it has a handler by now
            line = f"{signal.Signals(byte[0]).name} came before training began: start again"
            print(line, file=sys.stderr, flush=True)
            leave_report(line, EXIT_SIGNALLED, follows=True)
            os._exit(EXIT_SIGNALLED)
    os.close(pipe)


_blocked = threading.local()
"""Signals that were blocked before this thread forked."""


def _hold() -> None:
    """Hold back what comes during a fork until it is settled whose it is."""
    _blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.before)


def _as_before() -> None:
    """In a fork, whose parent has the thread: a signal ends it, and does not reach the parent by the pipe."""
    if signal.getsignal(signal.SIGTERM) is _leave_to_the_pipe:
        signal.set_wakeup_fd(-1)
        for number in NUMBERS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _let_go()


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_as_before)
