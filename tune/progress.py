"""What the search prints while it runs: one line per finished trial, and a progress line in a terminal."""

from __future__ import annotations

from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressCallback(Callback):
    """Prints the progress of an experiment on stderr; it holds numbers only, for Tune pickles it with the search."""

    def __init__(self, title: str, total: int, ended: int) -> None:
        """`ended`: trials, of `total`, that had ended before."""
        self.title, self.total = title, total
        self.best, self.best_trial = 0.0, ""
        self.ended, self.failed = ended, 0
        self.bar: Progress | None = None

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        """Show the progress line; Tune calls this when the experiment begins."""
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(self.title, total=self.total, completed=self.ended, note="")
        self.bar.start()

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, soft_wrap=True)

    def _refresh(self, running: int) -> None:
        if self.bar is not None:
            note = f"{running} running, {self.failed} failed, best {self.best:.4f} (trial {self.best_trial})"
            self.bar.update(self.task, completed=self.ended, note=note)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a validation, and print the sentence of a trial that failed."""
        if result["best"] > self.best:
            self.best, self.best_trial = result["best"], trial.trial_id
        if result["failed"]:
            self.failed += 1
            self._print(f"trial {trial.trial_id} failed: {result['failed']}")
        self._refresh(sum(t.status == "RUNNING" for t in trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the line of a trial that has ended."""
        self.ended += 1
        last = trial.last_result or {}
        if not last.get("failed"):
            self._print(
                f"trial {self.ended}/{self.total}: {last.get('best', 0):.4f} in {last.get('epoch', 0):.0f} epochs, "
                f"best so far {self.best:.4f}"
            )
        self._refresh(sum(t.status == "RUNNING" for t in trials))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the line of a trial whose process died once too often."""
        self.ended += 1
        self.failed += 1
        self._print(f"trial {trial.trial_id} failed: its process died too often, see {trial.error_file}")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Take the progress line away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bar": None}
