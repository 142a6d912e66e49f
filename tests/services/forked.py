"""Scripts in processes of their own that start in a tenth of the time: forked from one that has imported everything.

A script that trains spends five seconds on imports and a fraction of one on a run as small as those of the tests. Here
a server (multiprocessing's fork server) imports torch and the library once a test session, and each process is a fork
of it: with its own memory, exit code, signals and environment, but without torchrun, and with the same hash seed. So a
few tests still start scripts as users do: by python, torchrun and accelerate launch.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from tests.services.slurm import free_port

PRELOADED = [
    "pytest",
    "docstring_parser",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "sklearn.cross_decomposition",
    "sklearn.linear_model",
    "timm",
    "torchvision",
    "cmgan_dist.config.cli",
    "cmgan_dist.config.presets",
    "cmgan_dist.training.run",
    "cmgan_dist.training.loop",
    "cmgan_dist.report.run",
    "cmgan_dist.retrieval.baselines",
    "tests.services.forked",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
ROOT = str(Path(__file__).resolve().parents[2])


def _main(words: Sequence[str], env: Mapping[str, str], folder: str, cwd: str) -> None:
    """Be the script: what a new interpreter would do after its imports."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    gc.freeze()  # what was imported before stays: a collection need not look through it
    random.seed()
    np.random.seed()
    module = words[0] == "-m"
    sys.argv = list(words[1:] if module else words)
    sys.path[0:0] = [cwd if module else str(Path(words[0]).resolve().parent)]
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


class Forked:
    """A script that runs in one process, or in several that find each other as under torchrun."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], processes: int = 1, cwd: str = ROOT) -> None:
        """Start ``python WORDS``; `words`: a script, or ``-m`` and a module, and its arguments."""
        self._folder = tempfile.TemporaryDirectory()
        for name in ("out", "err"):
            (Path(self._folder.name) / name).touch()
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        meeting["LOCAL_WORLD_SIZE"] = str(processes)
        self.processes = []
        for rank in range(processes):
            place = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            # not daemonic: a run has processes of its own
            process = CONTEXT.Process(target=_main, args=(words, {**env, **place}, self._folder.name, cwd))
            _start(process)
            self.processes.append(process)

    @property
    def pid(self) -> int:
        """The first process."""
        pid = self.processes[0].pid
        assert pid is not None
        return pid

    def poll(self) -> int | None:
        """Return the exit code of the first process that failed, 0 when all have ended well, None before."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Return what the processes said; when one fails the others are ended, as torchrun does."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"not done within {timeout:.0f} s: {self._read('err')[-3000:]}")
            wait([p.sentinel for p in self.processes if p.exitcode is None], 1)
        for process in self.processes:
            process.join(0 if code == 0 else 2)
            if process.exitcode is None:
                process.terminate()
                process.join(30)
        self.kill()
        done = subprocess.CompletedProcess("forked", code, self._read("out"), self._read("err"))
        self._folder.cleanup()
        return done

    def kill(self) -> None:
        """End what is left with SIGKILL."""
        for process in self.processes:
            process.kill()
            process.join()

    def _read(self, name: str) -> str:
        return (Path(self._folder.name) / name).read_text()


def _start(process: multiprocessing.process.BaseProcess) -> None:
    """Start the process, and before the first one the server, whose numeric libraries shall have one thread and no
    GPU."""
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=ROOT)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(
    words: Sequence[str], env: Mapping[str, str], processes: int = 1, timeout: float = 300, cwd: str = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` to its end, like subprocess.run with captured output as text."""
    return Forked(words, env, processes, cwd).wait(timeout)
