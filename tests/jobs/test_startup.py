"""A signal while a program starts ends it with the exit code of a run that may be started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.jobs.startup import NUMBERS
from tests.toy import command, environment

PROGRAM = """
import os, signal, subprocess, sys, time
from cmgan_dist.jobs.startup import ended_by_signals, settled
within = ended_by_signals()
within.__enter__()
how = sys.argv[1]
if how == "fork":
    codes = set()
    for _ in range(100):  # the signal comes before the fork has had a turn, now and then
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(3)  # no further: kill(0) would end whoever runs the tests
        os.kill(child, signal.SIGTERM)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(*codes, flush=True)
if how == "child":
    signal.signal(signal.SIGCHLD, lambda *_: None)
    subprocess.run(["true"])
    time.sleep(1)
if how == "left":
    within.__exit__(None, None, None)
if how == "settled":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    settled()
print("ready", flush=True)
if how == "busy":
    sum(range(3 * 10**8))  # the interpreter gets no turn for seconds
time.sleep(30)
"""


def start(how: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, how]
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.process
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_start_with_85(number: signal.Signals) -> None:
    process = start("busy")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85, said
    assert said == f"{number.name} came before training began: start again\n"


@pytest.mark.process
def test_a_fork_ends_alone_and_later_handlers_count() -> None:
    process = start("fork")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["-15\n", "ready\n"]
    process.terminate()
    assert process.wait(60) == 85
    process.communicate()
    process = start("settled")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(60) == 7
    process.communicate()


@pytest.mark.process
@pytest.mark.parametrize(("how", "code"), [("child", 85), ("left", -signal.SIGTERM)])
def test_a_child_that_ends_is_no_signal_and_nothing_stays_behind(how: str, code: int) -> None:
    process = start(how)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(60) == code
    process.communicate()


def imports_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.process
@pytest.mark.parametrize("number", NUMBERS)
def test_a_start_of_training_is_ended_while_it_imports(
    number: signal.Signals, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    words = command(feature_data(), tmp_path / "run")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in imports_of(process.pid):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85, said
    assert said.splitlines()[-1] == f"{number.name} came before training began: start again"
    assert "Traceback" not in said
    assert not os.path.exists(tmp_path / "run" / "best")
