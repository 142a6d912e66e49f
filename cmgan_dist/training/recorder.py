"""What a run says of itself while it trains: metrics.jsonl, trackers, the progress line, where its time goes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmgan_dist.files import parse_json, read_bytes, write_atomic

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
"""The file of a run that has a JSON object a line: "kind" (train or val), "samples", "epoch" and what was measured."""

LARGEST = torch.finfo(torch.float32).max
"""Of what a run measures, the largest number; a figure's axes can be drawn to it."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl, none without the file; a last line cut by a crash is left out.

    Other lines that are damaged, or hold what no run writes, are left out too, and the log says which."""
    path = run / METRICS_NAME
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    content = read_bytes(path).split(b"\n")
    for number, line in enumerate(content[:-1] if content[-1] == b"" else content, 1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and _is_line(record):
            lines.append(record)
        elif number < len(content):
            damaged.append(number)
    if damaged:
        log.warning("%s: %d damaged lines are left out, the first is line %d", path, len(damaged), damaged[0])
    return lines


def _is_line(record: dict[str, Any]) -> bool:
    """Return whether a record is what `Recorder.line` writes: a kind, and beside it numbers that float32 holds
    and null."""
    samples, measured = record.get("samples"), (value for name, value in record.items() if name != "kind")
    return (
        isinstance(record.get("kind"), str)
        and isinstance(samples, int)
        and samples >= 0
        and all(value is None or _is_finite(value) for value in measured)
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


class Clock:
    """A stopwatch for the parts of a run: each `lap` puts the time since the one before it under a name.

    On a GPU the laps are events, read only by `take`: between those the device is never waited for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.totals: dict[str, float] = {}
        """Seconds since the start by name of lap, of laps that were taken."""
        self._laps: list[tuple[str, float, torch.cuda.Event | None]] = []
        self._first: tuple[float, torch.cuda.Event | None] = self._now()

    def _now(self) -> tuple[float, torch.cuda.Event | None]:
        event = None
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return time.perf_counter(), event

    def lap(self, name: str) -> None:
        """Put the time since the lap before under `name`."""
        self._laps.append((name, *self._now()))

    def take(self) -> dict[str, float]:
        """Return the seconds of all laps since the last call, by time/NAME."""
        if self.cuda:
            torch.cuda.synchronize()
        out: dict[str, float] = {}
        (before, event_before) = self._first
        for name, now, event in self._laps:
            if event is not None and event_before is not None:
                seconds = event_before.elapsed_time(event) / 1000
            else:
                seconds = now - before
            out[f"time/{name}"] = out.get(f"time/{name}", 0.0) + seconds
            self.totals[name] = self.totals.get(name, 0.0) + seconds
            before, event_before = now, event
        self._first, self._laps = (before, event_before), []
        return out

    def summary(self) -> str:
        """Return in words the shares of the time taken so far, the largest first."""
        total = sum(self.totals.values())
        parts = sorted(self.totals.items(), key=lambda item: -item[1])
        return f"{total:.1f} s: " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts)


@contextlib.contextmanager
def tracing(run: Path, rank: int, batches: int) -> Iterator[Callable[[], None]]:
    """Trace `batches` batches, after the first ten, by torch.profiler to RUN/trace/rank-N.json; 0 traces none.

    The context gives a function that is to be called after each batch."""
    if not batches:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        folder = run / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank}.json"))

    schedule = torch.profiler.schedule(wait=8, warmup=2, active=batches, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler.step


class Recorder:
    """Writes what a run says of itself, on the main process only: elsewhere its calls do nothing."""

    def __init__(self, run: Path, *, main: bool, track: Callable[[dict[str, float], int], None]) -> None:
        self.run, self.main, self.track = run, main, track
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    @contextlib.contextmanager
    def started(self, position: int, total: int) -> Iterator[None]:
        """Open metrics.jsonl and the progress line of a run of `total` samples; both are closed whatever happens.

        Lines beyond `position`, from a run that was cut, are dropped, since they are made again."""
        self._time, self._samples = time.monotonic(), position
        if not self.main:
            yield
            return
        if position and not (self.run / METRICS_NAME).is_file():
            log.warning("%s is gone: the lines before sample %d are lost", self.run / METRICS_NAME, position)
        kept = [line for line in read_metrics(self.run) if line.get("samples", 0) <= position]
        write_atomic(self.run / METRICS_NAME, "".join(json.dumps(line) + "\n" for line in kept))
        self.task = self.progress.add_task("samples", total=total, completed=position, note="")
        with self.progress, open(self.run / METRICS_NAME, "a", encoding="utf-8") as self._file:
            yield
            self._file.flush()
            os.fsync(self._file.fileno())

    def rate(self, position: int) -> float:
        """Return the samples per second since the last call, on all processes."""
        now = time.monotonic()
        rate = (position - self._samples) / max(now - self._time, 1e-9)
        self._time, self._samples = now, position
        return rate

    def line(self, kind: str, position: int, values: dict[str, Any], epoch_samples: int) -> None:
        """Write one line of metrics.jsonl, flushed, and give its numbers to the tracker as KIND/NAME.

        NaN and Inf become null, as JSON has neither."""
        if not self.main:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "samples": position, "epoch": round(position / epoch_samples, 4), **clean}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, int | float)}
        self.track(numbers, position)

    def show(self, position: int, note: str) -> None:
        """Move the progress line to `position` samples, with `note` beside it."""
        if self.main:
            self.progress.update(self.task, completed=position, note=note)

    def say(self, text: str) -> None:
        """Print a line to stderr, above the progress line, where it stays."""
        if self.main:
            self.progress.console.print(text, highlight=False, soft_wrap=True)
