"""What recorder.py keeps of each trial, and what --resume goes on from: OUTPUT/records/EXPERIMENT/NUMBER.json.

It is plain JSON with a checksum of itself. Ray Tune keeps its own state in pickles, which are never read: each start is
a new experiment of Tune's, told of what is known."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_sealed
from tune.results import ENDED, FAILED, STOPPED, UNFINISHED, TrialResult

log = logging.getLogger(__name__)

VERSION = 1
FOLDER = "records"
KEPT = ("validation", "epoch", "score", "best", "image_to_text", "text_to_image", "step_s", "time_this_iter_s")
"""Numbers of a validation that are kept."""


@dataclass
class Record:
    """One trial of an experiment."""

    number: int
    """The place of its setting among those of the experiment."""
    values: dict[str, Any]
    """Values by config path, as they are now: population-based training changes them."""
    validations: list[dict[str, float]] = field(default_factory=list)
    """KEPT of each validation, in their order."""
    node: str = ""
    done: bool = False
    """Trained to its end, stopped by the scheduler, or failed."""
    failed: str = ""
    """The sentence that says why it failed."""
    checkpoint: str = ""
    """Path from OUTPUT of the folder that it goes on from."""
    reached: int = 0
    """Validations of that checkpoint."""

    @property
    def last(self) -> dict[str, float]:
        """The last validation; zeros where there is none."""
        return self.validations[-1] if self.validations else dict.fromkeys(KEPT, 0.0)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: it failed by itself, or has ended and its checkpoint is that of its end. One
        whose process died too often is tried again by --resume."""
        return self.done and (bool(self.failed) or self.reached >= self.last["validation"])

    def add(self, result: dict[str, Any]) -> None:
        """Take in what a trial reports; a validation that was lost and done again counts once."""
        self.node, self.done = str(result.get("node", ""))[:8], bool(result.get("done"))
        self.failed = str(result.get("failed", ""))
        if not self.failed:
            row = {name: float(result[name]) for name in KEPT}
            before = [known for known in self.validations if known["validation"] < row["validation"]]
            self.validations = [*before, row]

    def result(self, name: str, whole: int) -> TrialResult:
        """Return what the search says of it under a name; a whole trial has so many validations."""
        last = self.last
        status = FAILED if self.failed else UNFINISHED
        if self.done and not self.failed:
            status = ENDED if last["validation"] >= whole else STOPPED
        scores = {key: last[key] for key in ("best", "image_to_text", "text_to_image")} if not self.failed else {}
        return TrialResult(
            name,
            self.values,
            status,
            **scores,
            epochs=last["epoch"] if not self.failed else 0.0,
            seconds=sum(row["time_this_iter_s"] for row in self.validations),
            step_seconds=sum(row["step_s"] for row in self.validations),
            node=self.node,
            failed=self.failed,
            curve=[(row["epoch"], row["score"]) for row in self.validations] if not self.failed else [],
        )


def record_path(experiment: str, number: int) -> str:
    """Return where in OUTPUT the record of a trial lies."""
    return f"{FOLDER}/{experiment}/{number:06d}.json"


def read_records(output: FileStore, experiment: str) -> dict[int, Record]:
    """Return what is known of an experiment's trials, by their numbers. One that goes on from a folder which is gone
    begins anew.

    Raises BadInput naming the file that is damaged."""
    found = {}
    for name in output.names(f"{FOLDER}/{experiment}"):
        if not re.fullmatch(r"\d+\.json", name):
            continue
        path = f"{FOLDER}/{experiment}/{name}"
        try:
            record = _checked(Record(**parse_sealed(output.read(path), VERSION)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BadInput(
                f"{output.location(path)} is damaged ({error}): restore it, or remove it, and its trial begins anew"
            ) from None
        found[record.number] = record
        if not record.finished and is_gone(output, record):
            log.warning("%s is gone: its trial begins anew", output.location(record.checkpoint))
            record.checkpoint, record.reached, record.validations = "", 0, []
    return found


def is_gone(output: FileStore, record: Record) -> bool:
    """Return whether the folder of a trial's checkpoint is not there any more. Raises BadInput when it cannot be
    read."""
    return bool(record.checkpoint) and not output.names(record.checkpoint)


def _checked(record: Record) -> Record:
    """Return a record whose fields are what they should be. Raises ValueError, KeyError or TypeError."""
    parts = record.checkpoint.split("/")
    kinds = [(record.number, int), (record.values, dict), (record.done, bool), (record.reached, int)]
    kinds += [(record.node, str), (record.failed, str)]
    if not all(isinstance(value, kind) for value, kind in kinds) or (
        record.checkpoint and {"", ".", ".."} & set(parts)
    ):
        raise ValueError("a field is of another kind")
    record.validations = [{name: float(row[name]) for name in KEPT} for row in record.validations]
    return record
