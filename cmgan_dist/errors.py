"""The two ways in which input can be wrong, and a lost process. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cmgan_dist.interrupts import EXIT_SIGNALLED, INTERRUPTED, Interruption, is_first_process

EXIT_DONE = 0
"""The command did all of its work."""
EXIT_LOST = 1
"""Another process of the run is gone (LostProcess)."""
EXIT_BAD_INPUT = 2
"""Input is wrong (BadInput)."""
FOLLOWS_S = 10
"""Longer than a process that fails is seen later than those that lose it, and less than the 30 s after which torchrun
kills those that do not end."""


CALLED: dict[str, str] = {}
"""Programs that sentences name, such as "launchers/index.py" -> what they are called where that is another name."""


_SECRETS = re.compile(r"\b([A-Za-z][\w+.-]+:/{1,2})(?:[^/?\s'\"]*@)?([^?\s'\"]*)(?:\?[^\s'\"]*[^\s'\",;):.])?")
"""A URL, as such or as pathlib writes one, with one slash: what is between its groups, and behind, may be secret."""


def _as_called(sentence: str) -> str:
    """Return a sentence with the programs that it names as this installation calls them."""
    for own, called in CALLED.items():
        sentence = sentence.replace(own, called)
    return sentence


def shown(text: str) -> str:
    """Return a name or a line as any terminal and file can hold it, in one line: what has no glyph is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shards_command(*words: object) -> str:
    """Return a command of `python -m shards` for a sentence, as a shell takes it."""
    return f"'python -m shards {shlex.join(map(str, words))}'"


class BadInput(ValueError):
    """Input by the user is wrong. The message is one sentence that names the file, field or flag,
    what was wrong and what to do. Launchers print it to stderr and exit with 2."""

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        """`everywhere`: every process of a run finds the same, so that the first one says it for all."""
        super().__init__(message)
        self.everywhere = everywhere


class Unreadable(BadInput):
    """A file is there and the system does not give it: nothing is known of what it holds, so nothing may replace it."""


_OF_ONE = re.compile(r"'[^']*'|\S*[\d/]\S*|\S+\.\w+")
"""What in the reason against one sample is of that sample: names in quotes, numbers, paths and file names."""
MOST_REASONS = 5
"""Kinds of reasons that a sentence names."""


def reasons_of(left_out: Sequence[str]) -> str:
    """Return why samples were left out, for a sentence: the first line, and how many there are of each kind.

    `left_out`: a line for each, ``where: reason``; "" for none."""
    if not left_out:
        return ""
    kinds = Counter(_OF_ONE.sub("…", line.partition(": ")[2] or line) for line in left_out)
    named = [f"{count} x {kind}" for kind, count in kinds.most_common(MOST_REASONS)]
    rest = len(kinds) - len(named)
    counted = f"; in all {'; '.join(named)}" if len(left_out) > 1 else ""
    return f"the first: {shown(left_out[0])}{counted}" + (f"; and {rest} other reasons" if rest else "")


class LostProcess(RuntimeError):
    """Another process of the run is gone or does not answer. Launchers print it and exit with 1."""


class BadSample(ValueError):
    """One sample cannot be used. The message says why; the stream replaces the sample."""


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How a URL begins, also where pathlib has made one slash of two."""


def refuse_url(path: object, what: str) -> None:
    """Raise BadInput when a path that was given as `what` is a URL. It is not shown: it may be signed."""
    if isinstance(path, str | os.PathLike) and _URL.match(os.fsdecode(path)):
        raise BadInput(f"{what} is a URL where only a path on this machine is read or written: copy it here, name that")


def _tell(sentence: str, code: int, *, aloud: bool = True, follows: bool = False) -> None:
    """Print an error to stderr, and leave it for launchers as `leave_report` does.

    Not `aloud`: another process of the run prints the same."""
    line = f"error: {_public(sentence)}"
    if aloud:
        print(line, file=sys.stderr, flush=True)
    leave_report(line, code, said=aloud, follows=follows)


def _public(sentence: str) -> str:
    """Return a sentence as it may be shown: in one line, without what is secret in URLs."""
    return shown(_SECRETS.sub(r"\1\2", _as_called(sentence)))


def leave_report(line: str, code: int, *, said: bool = True, follows: bool = False) -> None:
    """Leave the last words of this process, which ends with `code`, in the file TORCHELASTIC_ERROR_FILE.

    There torchrun, DeepSpeed's launcher and ours look for what to end their own report with.
    `said`: they are on stderr already. `follows`: something that befell another process brought them about. Launchers
    take the earliest report for the cause, so one that follows is dated FOLLOWS_S later."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        report = {"message": line, "timestamp": int(time.time()) + FOLLOWS_S * follows, "code": code, "said": said}
        with contextlib.suppress(OSError):  # it has been said; the report alone would end without it
            Path(f"{path}.part").write_text(json.dumps(report))
            os.replace(f"{path}.part", path)  # a launcher that ends this process reads all or nothing


def _end_interrupted() -> NoReturn:
    """Say that the command was interrupted, and end it. What Python does at its own end is left out: it waits for
    threads, and a further signal would be its end with a traceback."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"{INTERRUPTED}\n" if is_first_process() else "", end="", file=sys.stderr, flush=True)
    leave_report(INTERRUPTED, EXIT_SIGNALLED, follows=True)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    os._exit(EXIT_SIGNALLED)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: bad input, and a file that cannot be read or written, end as one sentence on
    stderr and exit code 2; Ctrl-C and SIGTERM as one and EXIT_SIGNALLED. By SIGTERM a launcher ends the processes that
    it started, where another of them has failed: those end as it expects."""
    interruption = Interruption()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding than UTF-8
    try:
        _check_working_folder()
        code = main()
    except KeyboardInterrupt:
        _end_interrupted()
    except Exception as error:
        if interruption.seen:  # of a library that was cut off
            _end_interrupted()
        code = _told(error)
        if code is None:
            raise
    if sys.stdout is not None:  # as it is where the caller has closed it
        sys.stdout.flush()
    gc.freeze()  # else Python looks for garbage among all that was imported before it ends, for up to 3 s
    sys.exit(code or EXIT_DONE)


def _check_working_folder() -> None:
    """Raise BadInput when the folder that the command was started in is gone: libraries end the process over it."""
    try:
        os.getcwd()
    except OSError as error:
        raise BadInput(
            f"the folder that this was started in cannot be used ({error.strerror}): change to one that is there"
        ) from None


_NO_MEMORY = re.compile(r"failed to map segment|can(?:no|')t allocate|out of memory", re.IGNORECASE)
"""How the loader, torch on a CPU and CUDA say that memory is used up."""


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is that memory is used up, of this process, the machine or a GPU."""
    said = isinstance(error, ImportError | RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return said or isinstance(error, MemoryError)


def _told(error: Exception) -> int | None:
    """Say an error in one sentence and return the exit code; None for a bug, whose traceback ends with its report."""
    match error:
        case BadInput():
            _tell(str(error), EXIT_BAD_INPUT, aloud=not error.everywhere or is_first_process())
            return EXIT_BAD_INPUT
        case BrokenPipeError():  # whoever read our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_LOST
        case OSError():
            named = f"{error.filename}: " if error.filename else ""
            reason = error.strerror or str(error)
            _tell(f"{named}{reason}: check the path, its permissions and the free space", EXIT_BAD_INPUT)
            return EXIT_BAD_INPUT
        case _ if _is_out_of_memory(error):
            reason = str(error).splitlines()[0].rstrip(". ") if str(error) else "MemoryError"
            _tell(f"memory is used up ({reason}): allow more, or use smaller batches or fewer processes", EXIT_LOST)
            return EXIT_LOST
        case LostProcess():
            _tell(str(error), EXIT_LOST, follows=True)
            os._exit(EXIT_LOST)  # what waits for the lost process, at exit too, would wait on
    leave_report(f"error: {_public(f'{type(error).__name__}: {error}')}", EXIT_LOST)
    return None
