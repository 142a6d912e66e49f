"""What benchmarks share: contestants in processes of their own, spreads, and results with machine and commit."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput

RESULTS = Path(__file__).parent / "results"


class Worker:
    """A contestant in a process of its own, which answers each line on its stdin by ``answer JSON``.

    Between an answer and the next line it is stopped, with what it has started: threads that go on looking for work
    would take time from whoever has the turn."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """`options`: of subprocess.Popen."""
        # in a group of its own, not a session: when this process is killed, the kernel ends stopped ones with it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0, **options
        )

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def answer(self) -> Any:
        """The next answer; other lines of output are passed over. Raises BadInput when the process ends without one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                self._signal(signal.SIGSTOP)
                return json.loads(line.removeprefix("answer "))
        raise BadInput("a worker ended without an answer: its traceback is above")

    def ask(self, line: object) -> Any:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Processor, cores, torch version and commit of this run."""
    import torch  # takes seconds, and is for the results alone

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x.partition(":")[2].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0] if names else model
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def write_results(name: str, record: dict[str, Any]) -> Path:
    """bench/results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **record}, indent=1, ensure_ascii=False) + "\n")
    return path
