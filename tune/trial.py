"""A trial as Ray Tune sees it: one step is the training up to the next validation."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.tune import Checkpoint, Trainable

from cmgan_dist.config.load import from_yaml, to_yaml
from cmgan_dist.config.paths import with_values

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a TCP port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def setting_key(values: dict[str, Any]) -> str:
    """Return a text that is the same for the same values by config path."""
    return json.dumps(values, sort_keys=True)


def _copy_run(source: str | Path, target: str | Path) -> None:
    """Copy a run without the pickle by which Ray would know a checkpoint of another kind, and read it."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pkl"))


class Server:
    """The process of tune/worker.py, started once per worker of the cluster."""

    def __init__(self, log: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tune.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is the driver's
            )

    def send(self, line: str) -> None:
        """Send a line: a trial in JSON, "go" or "stop"."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """Wait for the next message and return it; {"ended": exit code} when the process itself has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"ended": self.process.wait()}
        return message

    def close(self) -> None:
        """Kill the process, and with it the trial that it runs."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Trial(Trainable):
    """A trial trains `base` with its own values on top, in RUN on the node's disk, and reports each validation.

    Its checkpoint is a copy of RUN. A run that diverges, or a config that is not possible, is a result with score 0 and
    the sentence in "failed"; a process that dies is an error, after which Tune starts from the last checkpoint."""

    def setup(
        self,
        config: dict[str, Any],
        base: str = "",
        processes: int = 1,
        threads: int = 1,
        may_change: tuple[str, ...] = (),
        starts: dict[str, str] | None = None,
        filesystem: Any = None,
    ) -> None:
        """Get ready for a trial: `config` holds its values, the rest is what all trials share.

        `base` is a config in YAML, `threads` those of each process, `may_change` the fields that a run may resume with
        another value of, `starts` the checkpoints of an earlier start by `setting_key`, in `filesystem` (None: this
        machine's)."""
        self.base, self.processes, self.threads, self.may_change = base, processes, threads, may_change
        self.starts, self.filesystem = starts or {}, filesystem
        self.server: Server | None = None
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self.values: dict[str, Any] = config.get("values", config)
        self.folder = Path(self.logdir) / "run"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.running, self.validation = False, 0
        if start := self.starts.get(setting_key(self.values)):
            with Checkpoint(start, self.filesystem).as_directory() as checkpoint:
                _copy_run(checkpoint, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def step(self) -> dict[str, Any]:
        """Train up to the next validation and return what it reports. Raises RuntimeError when the process has died."""
        begun = time.monotonic()
        if self.server is None or self.server.process.poll() is not None:
            self.server = Server(Path(self.logdir) / "worker.log", self.threads)
            self.running = False
        if self.running:
            self.server.send("go")
        else:
            config = with_values(from_yaml(self.base, "the search's config"), self.values)
            config.output = str(self.folder)
            job = {"config": to_yaml(config), "may_change": self.may_change, "processes": self.processes}
            self.server.send(json.dumps(job | {"port": free_port(), "log": str(self.folder / "train.log")}))
        self.running = True
        message = self.server.read()
        cost = {"node": ray.get_runtime_context().get_node_id(), "step_s": time.monotonic() - begun}
        if "failed" in message:
            while "ended" not in message:
                failed, message = message["failed"], self.server.read()
            self.running = False
            nothing = dict.fromkeys(("score", "best", "image_to_text", "text_to_image"), 0.0)
            nothing |= {"samples": 0, "epoch": 0.0, "validation": self.validation + 1}
            return {**nothing, "failed": failed, "done": True, **cost}
        if "ended" in message:
            self.running = False
            log = self.folder / "train.log"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
            raise RuntimeError(f"the training process ended with {message['ended']}: {' '.join(last)}")
        done, self.validation = message.pop("last"), message["validation"]
        return {**message, "failed": "", "done": done, **cost}

    def _stop(self) -> None:
        """End the training; it waits for an answer whenever we are asked anything."""
        if not self.running or self.server is None:
            return
        self.running = False
        try:
            self.server.send("stop")
        except BrokenPipeError:
            return
        while "ended" not in self.server.read():
            pass

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy RUN to `checkpoint_dir`."""
        _copy_run(self.folder, checkpoint_dir)

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        """Put the folder `checkpoint` in the place of RUN, from which the next step goes on."""
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        _copy_run(str(checkpoint), self.folder)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same process of Ray."""
        self._stop()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.close()
