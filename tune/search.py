"""Search loss weights and learning rates with Ray Tune.

    python tune/search.py --preset openmoji --data DIR --output SEARCH --trials 40 [--confirm 5]

Validation decides; the test split is read once, at the end, for the best setting alone. Writes SEARCH/best.yaml (for
launchers/train.py --config), SEARCH/report.html, SEARCH/trials.json, SEARCH/records, from which --resume goes on, and
Tune's own folders for TensorBoard.
Exit codes: 0 done, 2 bad input, 85 interrupted: the same command with --resume goes on.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import contextlib
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from cmgan_dist.config.cli import join_data, parse
from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import to_yaml
from cmgan_dist.config.paths import get_value
from cmgan_dist.data.source import public_config, public_data, public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import EXIT_DONE, BadInput, run_main
from cmgan_dist.files import parse_json
from cmgan_dist.interrupts import EXIT_SIGNALLED
from cmgan_dist.jobs.lock import owning
from cmgan_dist.jobs.ray import start_ray
from tune.confirm import best_config, confirm, test_scores
from tune.options import SAME, Arguments, base_config, check_data, check_resume, load_base, settings_of
from tune.record import VERSION as RECORDS
from tune.record import Record, is_gone, read_records, record_path
from tune.results import Confirmed, TrialResult, importance, ranked, show_mean, show_table, trials_json
from tune.space import Space, check_space, domains, draw_settings, load_space, outside_of
from tune.tuner import (
    INTERRUPT,
    KEPT,
    KEPT_FOR_CLONES,
    make_scheduler,
    make_search,
    make_trainable,
    prepare_tune,
    run_of,
    run_tuner,
    trials_at_a_time,
)

log = logging.getLogger(__name__)

PRINTED = [key for name in ("image_to_text", "text_to_image", "mean") for key in (f"map/{name}", f"recall/{name}@10")]
"""Metrics of the test split that are printed, those that there are."""


@dataclass
class Plan:
    """A search whose input has been checked."""

    arguments: Arguments
    config: Config
    """The config that all trials share."""
    space: Space
    output: FileStore
    identity: dict[str, Any]
    """What --resume must find as it was."""
    validations: int
    """Validations of a whole trial."""
    resumed: bool
    start: dict[str, Any]
    """The preset's own values, which are the first trial."""


@dataclass
class Outcome:
    """What a search has found so far."""

    trials: list[TrialResult]
    runs: dict[str, list[Record]]
    """Records by the name of a setting: those of its confirming runs, else that of its trial."""
    seconds: float
    """Time that the trials took together, confirmation left out."""
    interrupted: bool
    confirmed: list[Confirmed] = field(default_factory=list)
    """The confirmed settings, best first."""
    test: dict[str, Any] = field(default_factory=dict)
    """{"name", "seeds", "scores"} of the best setting on the test split, empty when it was not read."""

    @property
    def best(self) -> str:
        """Name of the trial whose setting is kept: the best confirmed one, else the best trial; "" without any."""
        if self.confirmed:
            return self.confirmed[0].name
        best = ranked(self.trials)
        return best[0].name if best else ""


def search(arguments: Arguments) -> int:
    """Run the search to its end or an interruption and return the exit code. Raises BadInput naming the flag."""
    import ray

    INTERRUPT.seen = False
    plan = make_plan(arguments)
    with owning(Path(plan.output.path), "search") if plan.output.local else contextlib.nullcontext():
        prepare_tune()
        start_ray(arguments.address, arguments.nodes)
        try:
            return run_search(plan)
        finally:
            ray.shutdown()


def make_plan(arguments: Arguments) -> Plan:
    """Check the arguments, the space, the data and what --output holds. Raises BadInput naming what is wrong."""
    config = base_config(arguments)
    space = check_space(load_space(arguments.space), config)
    output = FileStore(arguments.output, "--output")
    validations, fingerprint = check_data(config, arguments.test_split if arguments.test else "")
    identity = {name: getattr(arguments, name) for name in SAME} | {"data": public_data(config.data), "space": space}
    identity |= {"records": RECORDS, "fingerprint": fingerprint, **settings_of(config)}
    resumed = check_resume(output, identity, arguments)
    start = {path: get_value(config, path) for path in space}
    return Plan(arguments, config, space, output, identity, validations, resumed, start)


def run_search(plan: Plan) -> int:
    """Try settings, confirm the best, read the test split for the best of these, and write what was found.

    Ray must run. Returns the exit code. Raises BadInput when every trial has failed or none fits the machines."""
    arguments = plan.arguments
    slots = trials_at_a_time(arguments)
    log.info("%d trials of up to %d validations, %d at a time", arguments.trials, plan.validations, slots)
    plan.output.write("search.json", json.dumps(plan.identity, indent=1) + "\n")
    outcome = try_settings(plan)
    if arguments.confirm and not outcome.interrupted:
        confirm_best(plan, outcome)
    if outcome.best and not outcome.interrupted:
        keep_best(plan, outcome)
    write_outcome(plan, outcome, slots)
    print_outcome(plan, outcome)
    return EXIT_SIGNALLED if outcome.interrupted else EXIT_DONE


def try_settings(plan: Plan) -> Outcome:
    """Run the trials, the preset first. Raises BadInput when every one has failed."""
    space = plan.space
    if outside := outside_of(space, plan.start):
        log.info("the first trial is the preset, although its %s is outside the search space", ", ".join(outside))
    known = read_records(plan.output, "search")
    begun = time.monotonic()
    run_trials(plan, known)
    seconds = time.monotonic() - begun
    names = {number: "preset" if number == 0 else str(number) for number in sorted(known)}
    trials = [known[number].result(name, plan.validations) for number, name in names.items()]
    if not ranked(trials) and not INTERRUPT.seen:
        reasons = [t.failed for t in trials if t.failed]
        raise BadInput(f"every trial failed, the first with: {reasons[0] if reasons else 'no validation'}")
    runs = {name: [known[number]] for number, name in names.items()}
    return Outcome(trials, runs, seconds, INTERRUPT.seen)


def run_trials(plan: Plan, known: dict[int, Record]) -> None:
    """Run the trials that are not `known` to have ended; then all that they came to is known."""
    arguments, space = plan.arguments, plan.space
    drawn = draw_settings(space, arguments.trials, arguments.seed, plan.start)
    numbers = [number for number in range(arguments.trials) if number not in known or not known[number].finished]
    free = arguments.algorithm.startswith("optuna")  # it chooses settings by what the others came to
    if free:
        numbers.sort(key=lambda number: number not in known)
    given = [known[n].values if n in known else drawn[n] for n in numbers if n in known or n == 0 or not free]
    settings: dict[str, Any] = {"search_alg": make_search(space, arguments, known, given), "num_samples": len(numbers)}
    settings["scheduler"] = make_scheduler(space, arguments, plan.validations, known)
    settings |= {"max_concurrent_trials": arguments.concurrent} if arguments.concurrent and free else {}
    settings |= {"time_budget_s": arguments.time_budget_s} if arguments.time_budget_s else {}
    trainable = make_trainable(plan.config, arguments, space, plan.output, known)
    keep = KEPT_FOR_CLONES if arguments.algorithm == "pbt" else KEPT
    param_space = {} if free else domains(space)
    every = arguments.checkpoint_every
    run_tuner("search", plan.output, trainable, settings, param_space, numbers, known, every, keep)


def confirm_best(plan: Plan, outcome: Outcome) -> None:
    """Train the best settings and the preset again from new seeds, and note how they did."""
    chosen = [(t.name, t.values) for t in ranked(outcome.trials)[: plan.arguments.confirm_top]]
    if "preset" not in dict(chosen):
        chosen.append(("preset", plan.start))
    confirmed = confirm(plan.arguments, plan.config, plan.space, plan.output, chosen)
    outcome.confirmed, runs, outcome.interrupted = confirmed
    outcome.runs |= {name: records for name, records in runs.items() if records}


def keep_best(plan: Plan, outcome: Outcome) -> None:
    """Copy the best run to OUTPUT/best and, unless --no-test is given, read the test split for it.

    Raises BadInput when the run is gone."""
    runs = [record for record in outcome.runs[outcome.best] if record.checkpoint]
    gone = [record for record in runs if is_gone(plan.output, record)]
    if not runs or (gone and not plan.arguments.test and is_kept(plan.output, outcome.best)):
        return
    if gone:
        experiment = "confirm" if outcome.confirmed else "search"
        records = ", ".join(plan.output.location(record_path(experiment, record.number)) for record in gone)
        raise BadInput(
            f"{plan.output.location(gone[0].checkpoint)}, a run of the best trial, is gone: restore it, or remove "
            f"{records}, and --resume trains it again"
        )
    with contextlib.ExitStack() as stack:  # of a remote output, local copies
        folders = [stack.enter_context(run_of(plan.output, run)) for run in runs]
        plan.output.put(folders[0], "best")
        if plan.arguments.test:
            scores = test_scores(folders, plan.arguments.test_split)
            outcome.test = {"name": outcome.best, "seeds": len(runs), "scores": scores}


def is_kept(output: FileStore, best: str) -> bool:
    """Return whether OUTPUT/best holds the run of the trial `best`, as an earlier start has told."""
    try:
        told = parse_json(output.read("trials.json"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(told, dict) and told.get("best") == best and bool(output.names("best"))


def write_outcome(plan: Plan, outcome: Outcome, slots: int) -> None:
    """Write trials.json, report.html and, when any trial has validated, best.yaml; `slots` trials ran at a time."""
    arguments, output, trials = plan.arguments, plan.output, outcome.trials
    trial_seconds = sum(t.seconds for t in trials)
    timing = {"resumed": plan.resumed, "search_s": outcome.seconds, "trial_s": trial_seconds, "slots": slots}
    extra = {"search": plan.identity, "interrupted": outcome.interrupted, "validations": plan.validations}
    extra |= {"timing": timing, "best": outcome.best, "test": outcome.test}
    found = importance(trials, plan.space)
    output.write("trials.json", trials_json(trials, outcome.confirmed, found, extra))
    title = f"Search from {arguments.preset or Path(arguments.config).name}"
    facts: dict[str, Any] = {"trials": len(trials), "algorithm": arguments.algorithm, "trials at a time": slots}
    facts |= {
        "data": public_data(plan.config.data),
        "search": f"{outcome.seconds:.0f} s",
        "sum of trials": f"{trial_seconds:.0f} s",
    }
    from tune.report import search_report  # with matplotlib, and --help waits

    page = search_report(title, facts, trials, plan.space, outcome.confirmed, found, outcome.test)
    output.write("report.html", page)
    if outcome.best:
        values = next(t.values for t in trials if t.name == outcome.best)
        output.write("best.yaml", to_yaml(public_config(best_config(plan.config, values, load_base(arguments)))))


def print_outcome(plan: Plan, outcome: Outcome) -> None:
    """Print the best trials, where the best setting lies, its scores on the test split, and how to go on."""
    console, url, test = Console(), public_url(plan.output.url), outcome.test
    if outcome.best:
        show_table(outcome.trials, outcome.confirmed, console)
        console.print(f"best: trial {outcome.best}, {url}/best.yaml; report: {url}/report.html", soft_wrap=True)
    for key in PRINTED:
        if key in test.get("scores", {}):
            mean, std = test["scores"][key]
            value = show_mean(mean, std, test["seeds"])
            console.print(f"test {key}: {value} over {test['seeds']} run{'s' * (test['seeds'] > 1)}")
    if outcome.interrupted:
        console.print("interrupted: the same command with --resume goes on", soft_wrap=True)


def main() -> int:
    """Parse the command line, run the search and return the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    arguments = parse(Arguments, join_data(sys.argv[1:]), prog="tune/search.py")
    try:
        return search(arguments)
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on", file=sys.stderr)
        return EXIT_SIGNALLED


if __name__ == "__main__":
    run_main(main)
