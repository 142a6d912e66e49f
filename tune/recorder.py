"""Keeps the records of trials while Ray Tune runs them; record.py says what they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune import Callback

from cmgan_dist.data.store import FileStore
from cmgan_dist.files import sealed_json
from tune.record import VERSION, Record, record_path


class Recorder(Callback):
    """Writes a record of each trial of a running experiment whenever something has come of it."""

    def __init__(
        self,
        output: FileStore,
        experiment: str,
        numbers: Sequence[int],
        known: dict[int, Record],
        cut_short: Callable[[], bool],
    ) -> None:
        """`numbers`: those of the trials in the order in which Tune makes them. `cut_short`: whether an interruption,
        or the end of its time, ends the experiment."""
        self.output, self.experiment, self.numbers, self.records = output, experiment, numbers, known
        self.cut_short = cut_short

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it with its own state, which nobody reads

    def _record(self, trials: list[Any], trial: Any) -> Record:
        number = self.numbers[next(i for i, each in enumerate(trials) if each is trial)]
        record = self.records.setdefault(number, Record(number, {}))
        record.values = dict(trial.config.get("values", trial.config))
        return record

    def _write(self, record: Record) -> None:
        text = sealed_json({"version": VERSION, **dataclasses.asdict(record)})
        self.output.write(record_path(self.experiment, record.number), text)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a validation, or the sentence of a trial that failed."""
        record = self._record(trials, trial)
        record.add(result)
        self._write(record)

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the checkpoint that was written."""
        record, saved = self._record(trials, trial), trial.latest_checkpoint_result
        if saved is not None and str(saved.checkpoint.path).startswith(f"{self.output.path}/"):
            record.checkpoint = str(saved.checkpoint.path)[len(self.output.path) + 1 :]
            record.reached = int(saved.metrics.get("validation", 0))
            self._write(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial which was waiting for others is stopped by the scheduler."""
        if trial.status == "PAUSED" and not self.cut_short():
            record = self._record(trials, trial)
            record.done = True
            self._write(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial's process died once too often."""
        record = self._record(trials, trial)
        record.done = False
        said = str(trial.get_error() or "").strip().splitlines()
        record.failed = "its process died too often" + (f" ({said[-1][:200]})" if said else "")
        self._write(record)
