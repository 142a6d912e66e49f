"""Search loss weights and learning rates with Ray Tune.

    python tune/search.py --preset openmoji --data DIR --output SEARCH --trials 40 [--confirm 5]

Validation decides; the test split is read once, at the end, for the best setting alone. Writes SEARCH/best.yaml (for
launchers/train.py --config), SEARCH/report.html, SEARCH/trials.json, and Tune's own folders for TensorBoard.
Exit codes: 0 done, 2 bad input, 85 interrupted: the same command with --resume goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import to_yaml
from cmgan_dist.config.paths import get_value
from cmgan_dist.errors import EXIT_DONE, EXIT_SIGNALLED, BadInput, run_main
from cmgan_dist.jobs.ray import start_ray
from tune.confirm import best_config, confirm, test_scores
from tune.options import SAME, Arguments, base_config, check_data, check_resume, load_base
from tune.report import search_report
from tune.results import (
    Confirmed,
    importance,
    ranked,
    show_table,
    trials_json,
)
from tune.space import (
    Space,
    check_space,
    domains,
    load_space,
    outside_of,
)
from tune.storage import Output
from tune.tuner import (
    INTERRUPT,
    KEPT_FOR_CLONES,
    make_algorithm,
    make_trainable,
    prepare_tune,
    record_of,
    run_tuner,
    slots,
)

log = logging.getLogger(__name__)


def search(arguments: Arguments) -> int:
    """Run the search to its end or an interruption; returns the exit code. Raises BadInput."""
    import ray

    INTERRUPT.seen = False
    config = base_config(arguments)
    space = check_space(load_space(arguments.space), config)
    output = Output(arguments.output)
    identity = {name: getattr(arguments, name) for name in SAME} | {"data": config.data, "space": space}
    resumed = check_resume(output, identity, arguments)
    validations = check_data(config, arguments.test_split if arguments.test else "")
    prepare_tune()
    start_ray(arguments.address, arguments.nodes)
    try:
        return run_search(arguments, config, space, output, identity, validations, resumed)
    finally:
        ray.shutdown()


def run_search(
    arguments: Arguments,
    config: Config,
    space: Space,
    output: Output,
    identity: dict[str, Any],
    validations: int,
    resumed: bool,
) -> int:
    """`search` on a running Ray."""
    at_a_time = slots(arguments)
    log.info("%d trials of up to %d validations, %d at a time", arguments.trials, validations, at_a_time)
    output.write("search.json", json.dumps(identity, indent=1) + "\n")

    start = {path: get_value(config, path) for path in space}
    if outside := outside_of(space, start):
        log.info("the first trial is the preset, although its %s is outside the search space", ", ".join(outside))
    trainable = make_trainable(config, arguments, space)
    algorithm, scheduler = make_algorithm(space, arguments, validations, start)
    settings: dict[str, Any] = {"search_alg": algorithm, "scheduler": scheduler, "num_samples": arguments.trials}
    settings |= {"max_concurrent_trials": arguments.concurrent} if arguments.concurrent else {}
    settings |= {"time_budget_s": arguments.time_budget_s} if arguments.time_budget_s else {}
    param_space = {} if arguments.algorithm.startswith("optuna") else domains(space)
    begun = time.monotonic()
    keep = KEPT_FOR_CLONES if arguments.algorithm == "pbt" else 1
    pairs = run_tuner(
        "search", output, trainable, settings, param_space, arguments.trials, arguments.checkpoint_every, keep
    )
    wall = time.monotonic() - begun
    stopped = INTERRUPT.seen
    records = [
        record_of("preset" if i == 0 else str(i), trial, result, validations) for i, (trial, result) in enumerate(pairs)
    ]
    order = ranked(records)
    if not order and not stopped:
        reasons = [r.failed for r in records if r.failed]
        raise BadInput(f"every trial failed, the first with: {reasons[0] if reasons else 'no validation'}")

    confirmed: list[Confirmed] = []
    finished: dict[str, list[Any]] = {}
    if arguments.confirm and not stopped:
        chosen = [(r.name, r.values) for r in order[: arguments.confirm_top]]
        if "preset" not in dict(chosen):
            chosen.append(("preset", start))
        confirmed, finished, stopped = confirm(arguments, config, output, trainable, chosen)
    names = {r.name: i for i, r in enumerate(records)}
    best = confirmed[0].name if confirmed else order[0].name if order else ""
    test: dict[str, Any] = {}
    if best and not stopped:
        runs = finished.get(best) or [pairs[names[best]][1]]
        with contextlib.ExitStack() as stack:  # of a remote output, local copies
            folders = [Path(stack.enter_context(run.checkpoint.as_directory())) for run in runs]
            output.put(folders[0], "best")
            if arguments.test:
                test = {"name": best, "seeds": len(runs), "scores": test_scores(folders, arguments.test_split)}
    facts: dict[str, Any] = {"trials": len(records), "algorithm": arguments.algorithm, "trials at a time": at_a_time}
    timing = {"resumed": resumed, "search_s": wall, "trial_s": sum(r.seconds for r in records), "slots": at_a_time}
    facts |= {"data": config.data, "search": f"{wall:.0f} s", "sum of trials": f"{timing['trial_s']:.0f} s"}
    found = importance(records, space)
    extra = {"search": identity, "interrupted": stopped, "validations": validations, "timing": timing}
    output.write("trials.json", trials_json(records, confirmed, found, extra | {"best": best, "test": test}))
    title = f"Search from {arguments.preset or Path(arguments.config).name}"
    output.write("report.html", search_report(title, facts, records, space, confirmed, found, test))
    console = Console()
    if best:
        winner = best_config(config, records[names[best]].values, load_base(arguments))
        output.write("best.yaml", to_yaml(winner))
        show_table(records, confirmed, console)
        console.print(f"best: trial {best}, {output.url}/best.yaml; report: {output.url}/report.html", soft_wrap=True)
    runs_of = f"{test['seeds']} run{'s' * (test['seeds'] > 1)}" if test else ""
    for key in ("image_to_text", "text_to_image", "mean"):
        for measure in (f"map/{key}", f"recall/{key}@10"):
            if measure in test.get("scores", {}):
                mean, std = test["scores"][measure]
                console.print(f"test {measure}: {mean:.4f} ± {std:.4f} over {runs_of}")
    if stopped:
        console.print("interrupted: the same command with --resume goes on", soft_wrap=True)
    return EXIT_SIGNALLED if stopped else EXIT_DONE


def main() -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    arguments = parse(Arguments, sys.argv[1:], prog="tune/search.py")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return search(arguments)
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on", file=sys.stderr)
        return EXIT_SIGNALLED


if __name__ == "__main__":
    run_main(main)
