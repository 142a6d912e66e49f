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
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "tune"):  # started as a script: the root instead of this folder
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402
from rich.logging import RichHandler  # noqa: E402

from cmgan_dist.config.cli import parse  # noqa: E402
from cmgan_dist.config.fields import Config  # noqa: E402
from cmgan_dist.config.load import (  # noqa: E402
    load_config,
    to_yaml,
    validate,
)
from cmgan_dist.config.presets import preset  # noqa: E402
from cmgan_dist.errors import EXIT_DONE, EXIT_SIGNALLED, BadInput, run_main  # noqa: E402
from tune.report import search_report  # noqa: E402
from tune.results import (  # noqa: E402
    ENDED,
    FAILED,
    STOPPED,
    UNFINISHED,
    Confirmed,
    Record,
    importance,
    ranked,
    show_table,
    trials_json,
)
from tune.space import (  # noqa: E402
    Space,
    apply_values,
    check_space,
    clip,
    domains,
    get_value,
    load_space,
    mutable,
    outside_of,
)
from tune.storage import Output  # noqa: E402

log = logging.getLogger(__name__)

OBJECT_STORE = 100 * 2**20
"""Bytes; the search keeps nothing there."""
MOST_FAILURES = 3
"""Times that a trial whose process died is started again from its last checkpoint."""
KEPT_FOR_CLONES = 4
"""Checkpoints of a trial under PBT: one may be cloned while the next are written."""
NODES_WITHIN_S = 180.0
SAME = ("preset", "config", "data", "trials", "algorithm", "epochs", "val_every", "grace", "reduction", "seed")
"""What --resume must find as it was."""


@dataclass
class Arguments:
    """Search for better loss weights and learning rates than those of a preset."""

    preset: str = ""
    """Preset to start from; its own values are the first trial."""
    config: str = ""
    """YAML file to start from instead of a preset."""
    data: str = ""
    """Folder or URL of shards; on a cluster every node must reach it."""
    output: str = ""
    """Folder or URL (fsspec) of the search; on a cluster every node must reach it."""
    trials: int = 40
    """Settings to try."""
    algorithm: Literal["asha", "random", "optuna", "optuna-both", "hyperband", "pbt"] = "asha"
    """asha: random settings, the worse ones stopped early. random: none is stopped. optuna: TPE with asha's stopping.
    optuna-both: TPE on the MAP of both directions (a Pareto front). hyperband: synchronous. pbt: weights and rates are
    mutated during training, the worse trials go on from the checkpoints of the better."""
    space: str = ""
    """YAML file that replaces the search space, see tune/space.py."""
    epochs: float = 0.0
    """Length of a whole trial; 0 is the preset's."""
    val_every: float = 0.0
    """Epochs between the validations, at which trials are judged; 0 is the preset's."""
    grace: int = 1
    """Validations before the first trial is stopped; for pbt: between mutations."""
    reduction: int = 3
    """One in this many goes on at each rung."""
    processes: int = 1
    """Processes of a trial (DDP), all on one node."""
    cpus: float = 1.0
    """CPUs of a trial; fractions share one."""
    gpus: float = 0.0
    """GPUs of a trial; fractions share one, several processes need one each."""
    concurrent: int = 0
    """Most trials at a time; 0 is as many as fit."""
    checkpoint_every: int = 1
    """Validations between the checkpoints from which a trial goes on after a crash."""
    confirm: int = 0
    """Train the best settings, and the preset, again from this many new seeds; their mean decides."""
    confirm_top: int = 3
    """How many settings are confirmed."""
    test: bool = True
    """At the end, read the test split for the best setting."""
    test_split: str = "test"
    """Its name."""
    time_budget_s: float = 0.0
    """Stop the search after so many seconds; 0 is no limit."""
    resume: bool = False
    """Go on with the search in --output."""
    address: str = ""
    """Ray cluster: auto, or its address; "" starts Ray on this machine."""
    nodes: int = 1
    """Wait until so many nodes have joined the cluster."""
    seed: int = 0
    """Of the settings that are drawn."""


# ---------------------------------------------------------------------------------------------- set-up


def base_config(arguments: Arguments) -> Config:
    """The config that all trials share. Raises BadInput naming the flag."""
    if bool(arguments.preset) == bool(arguments.config):
        raise BadInput("name either --preset or --config: see tune/search.py --help")
    for flag, low in (("trials", 1), ("grace", 1), ("reduction", 2), ("processes", 1), ("checkpoint_every", 1)):
        if getattr(arguments, flag) < low:
            raise BadInput(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}, expected {low} or more")
    if arguments.cpus <= 0 or arguments.gpus < 0 or arguments.confirm < 0 or arguments.confirm_top < 1:
        raise BadInput("--cpus must be above 0, --gpus and --confirm 0 or more, --confirm-top 1 or more")
    if arguments.gpus and arguments.processes > 1 and arguments.gpus < arguments.processes:
        raise BadInput(f"--gpus {arguments.gpus:g} is too few for --processes {arguments.processes}: give one each")
    config = load_base(arguments)
    config.data = arguments.data or config.data
    if "://" not in config.data and config.data:
        config.data = ",".join(str(Path(part).resolve()) for part in config.data.split(","))
    for flag, value in (("--data", config.data), ("--output", arguments.output)):
        if not value:
            raise BadInput(f"{flag} is missing: name a folder, see tune/search.py --help")
    config.output = ""
    train = config.train
    train.epochs = arguments.epochs or train.epochs
    train.val_every = arguments.val_every or train.val_every or train.epochs
    train.save_every, train.keep, train.tracker, train.report = train.val_every, 1, "none", False
    train.threads = max(1, int(arguments.cpus) // arguments.processes)
    return validate(config)


def check_data(config: Config, test_split: str) -> int:
    """Validations of a whole trial. Raises BadInput for what all trials would stumble over."""
    from cmgan_dist.data.order import steps_for
    from cmgan_dist.data.reader import ShardReader
    from cmgan_dist.data.stream import Stream

    stream = Stream(config.data, config.stream, seed=0, image_size=config.model.image.image_size, rank=0, world=1)
    for split in filter(None, (config.stream.val_split, test_split)):
        ShardReader(stream.readers[0].data, split, config.stream)
    batch = config.stream.global_batch
    total, every = (steps_for(e, stream.epoch_samples, batch) for e in (config.train.epochs, config.train.val_every))
    return -(-total // every)


def start_ray(address: str, least: int) -> None:
    import ray

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # see Interrupt
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # trials that have not begun
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a killed driver forgets
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # it is a few kB
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    settings["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if address:
        try:
            ray.init(address=address, **settings)
        except ConnectionError as error:
            raise BadInput(
                f"--address {address} is no running Ray cluster ({error}): start it by 'ray start'"
            ) from None
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **settings)
    deadline = time.monotonic() + NODES_WITHIN_S
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < least:
        if time.monotonic() > deadline:
            raise BadInput(
                f"--nodes is {least}, but {nodes} joined within {NODES_WITHIN_S:.0f} s: see the others' logs"
            )
        time.sleep(0.5)
    log.info("Ray: %d node%s, %g CPUs, %g GPUs", nodes, "s" * (nodes > 1), *_resources())


def _resources() -> tuple[float, float]:
    import ray

    found = ray.cluster_resources()
    return found.get("CPU", 0.0), found.get("GPU", 0.0)


def slots(arguments: Arguments) -> int:
    """Trials that run at a time. Raises BadInput when none fits."""
    cpus, gpus = _resources()
    fit = int(cpus / arguments.cpus + 1e-6)
    if arguments.gpus:
        fit = min(fit, int(gpus / arguments.gpus + 1e-6))
    if not fit:
        raise BadInput(
            f"a trial with --cpus {arguments.cpus:g} --gpus {arguments.gpus:g} does not fit: there are {cpus:g} CPUs "
            f"and {gpus:g} GPUs"
        )
    return min(fit, arguments.concurrent or fit)


# ---------------------------------------------------------------------------------------------- Ray Tune


def make_trainable(config: Config, arguments: Arguments, space: Space) -> Any:
    from ray.tune import with_parameters, with_resources

    from cmgan_dist.train import MAY_CHANGE
    from tune.trial import Trial

    may_change = (*MAY_CHANGE, *(p for p in space if mutable(p))) if arguments.algorithm == "pbt" else MAY_CHANGE
    trainable = with_parameters(
        Trial,
        base=to_yaml(config),
        processes=arguments.processes,
        threads=config.train.threads,
        may_change=tuple(may_change),
    )
    return with_resources(trainable, {"cpu": arguments.cpus, "gpu": arguments.gpus})


def make_algorithm(space: Space, arguments: Arguments, validations: int, start: dict[str, Any]) -> tuple[Any, Any]:
    """(search algorithm, scheduler) of --algorithm. `start`: the first setting."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, HyperBandScheduler, PopulationBasedTraining
    from ray.tune.search import BasicVariantGenerator

    points = [start]
    name = arguments.algorithm
    if name.startswith("optuna"):
        from ray.tune.search.optuna import OptunaSearch

        both = name == "optuna-both"
        search: Any = OptunaSearch(
            space=OptunaSearch.convert_search_space(domains(space)),
            metric=["image_to_text", "text_to_image"] if both else "best",
            mode=["max", "max"] if both else "max",
            points_to_evaluate=points,
            seed=arguments.seed,
        )
    else:
        search = BasicVariantGenerator(points_to_evaluate=points, random_state=arguments.seed)
    when: dict[str, Any] = {"time_attr": "training_iteration"}
    scheduler: Any
    if name == "random":
        scheduler = FIFOScheduler()
    elif name == "hyperband":
        scheduler = HyperBandScheduler(**when, max_t=validations, reduction_factor=arguments.reduction)
    elif name == "pbt":
        changing = {p: d for p, d in domains(space).items() if mutable(p)}
        if not changing:
            raise BadInput("--algorithm pbt mutates loss weights, rates and dropout: the search space has none of them")
        scheduler = PopulationBasedTraining(
            **when,
            perturbation_interval=arguments.grace,
            hyperparam_mutations=changing,
            custom_explore_fn=lambda values: clip(space, values),
        )
    else:
        scheduler = AsyncHyperBandScheduler(
            **when,
            max_t=validations,
            grace_period=min(arguments.grace, validations),
            reduction_factor=arguments.reduction,
        )
    return search, scheduler


def run_tuner(
    name: str,
    output: Output,
    trainable: Any,
    settings: dict[str, Any],
    param_space: dict[str, Any],
    total: int,
    checkpoint_every: int,
    keep: int = 1,
) -> list[tuple[Any, Any]]:
    """Run, or go on with, the experiment OUTPUT/name; (Tune's trial, its result) in the order of their making."""
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

    from tune.progress import Teller

    storage = output.for_ray()
    filesystem = {k: v for k, v in storage.items() if k == "storage_filesystem"}
    where = output.at(name)
    if Tuner.can_restore(where, **filesystem):
        tuner = Tuner.restore(where, trainable, param_space=param_space, **filesystem)
    else:
        tuner = Tuner(
            trainable,
            param_space=param_space,
            tune_config=TuneConfig(
                metric="best", mode="max", reuse_actors=True, trial_dirname_creator=lambda t: t.trial_id, **settings
            ),
            run_config=RunConfig(
                name=name,
                **storage,
                verbose=0,
                callbacks=[Teller(name, total)],
                failure_config=FailureConfig(max_failures=MOST_FAILURES),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=keep, checkpoint_frequency=checkpoint_every, checkpoint_at_end=True
                ),
            ),
        )
    with INTERRUPT.watching():
        grid = tuner.fit()
    # A result does not say if it is final: its trial does. A restored run has them in another order.
    pairs = list(zip(grid._experiment_analysis.trials, [grid[i] for i in range(len(grid))], strict=True))
    return sorted(pairs, key=lambda pair: int(pair[0].experiment_tag.partition("_")[0]))


class Interrupt:
    """Ctrl-C and SIGTERM: Tune ends its run cleanly on SIGUSR1, but does not tell that it did."""

    def __init__(self) -> None:
        self.seen = False

    def _handle(self, number: int, frame: Any) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once
        os.kill(os.getpid(), signal.SIGUSR1)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While Tune runs. Elsewhere both signals raise KeyboardInterrupt."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        if self.seen:
            raise KeyboardInterrupt
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in numbers}
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Tune handles it
        for number in numbers[:2]:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


INTERRUPT = Interrupt()


def record_of(name: str, trial: Any, result: Any, validations: int) -> Record:
    """What is kept of a trial."""
    values = dict(trial.config.get("values", trial.config))
    last = trial.last_result or {}
    rows = result.metrics_dataframe
    record = Record(name, values, UNFINISHED, node=str(last.get("node", ""))[:8])
    if rows is not None and len(rows):
        record.seconds, record.step_seconds = float(rows["time_this_iter_s"].sum()), float(rows["step_s"].sum())
        rows = rows.drop_duplicates("training_iteration", keep="last")  # what was lost in a crash and done again
        if not last.get("failed"):
            record.curve = [(float(e), float(v)) for e, v in zip(rows["epoch"], rows["score"], strict=True)]
    if trial.status == "ERROR":
        record.status = FAILED
        record.failed = str(result.error).strip().splitlines()[-1] if result.error else "its process died too often"
    elif last.get("failed"):
        record.status, record.failed = FAILED, last["failed"]
    elif last.get("done"):  # of trials that an interruption cut, Tune says TERMINATED too
        record.status = ENDED if last.get("training_iteration", 0) >= validations else STOPPED
    for key in ("best", "image_to_text", "text_to_image"):
        setattr(record, key, float(last.get(key, 0.0)))
    record.epochs = float(last.get("epoch", 0.0))
    return record


# ---------------------------------------------------------------------------------------------- the best


def confirm(
    arguments: Arguments, config: Config, output: Output, trainable: Any, settings: list[tuple[str, dict[str, Any]]]
) -> tuple[list[Confirmed], dict[str, list[Any]], bool]:
    """Train each (name, values) from new seeds: (means, Tune's results by name, whether it was interrupted)."""
    from ray.tune import grid_search

    seeds = [config.train.seed + 1 + k for k in range(arguments.confirm)]
    runs = [(name, values | {"train.seed": seed}) for name, values in settings for seed in seeds]
    concurrent = {"max_concurrent_trials": arguments.concurrent} if arguments.concurrent else {}
    space = {"values": grid_search([values for _, values in runs])}
    pairs = run_tuner("confirm", output, trainable, concurrent, space, len(runs), arguments.checkpoint_every)
    if INTERRUPT.seen:
        return [], {}, True
    results: dict[str, list[Any]] = {name: [] for name, _ in settings}
    scores: dict[str, list[float]] = {name: [] for name, _ in settings}
    for (name, expected), (trial, result) in zip(runs, pairs, strict=True):
        assert trial.config["values"] == expected
        fine = trial.status == "TERMINATED"
        scores[name].append(float(trial.last_result["best"]) if fine else 0.0)
        results[name] += [result] if fine else []
    out = [Confirmed(n, values, scores[n], [r.checkpoint.path for r in results[n]]) for n, values in settings]
    return sorted(out, key=lambda c: -c.mean), results, False


def test_scores(runs: list[Path], split: str) -> dict[str, list[float]]:
    """{metric: [mean, standard deviation]} of the runs' best generators on `split`."""
    from cmgan_dist.data.reader import ShardReader
    from cmgan_dist.distributed.processes import Parallel
    from cmgan_dist.embed import embed_split
    from cmgan_dist.metrics import evaluate
    from cmgan_dist.models.saved import load_model

    found: dict[str, list[float]] = {}
    for run in runs:
        generator, config, _ = load_model(run)
        parallel = Parallel(config.train.precision)
        generator.to(parallel.device)
        reader = ShardReader(config.data.split(",")[0], split, config.stream)
        metrics = evaluate(embed_split(generator, reader, config, parallel).common, zscore=config.eval.zscore)
        for key, value in metrics.items():
            if isinstance(value, float):
                found.setdefault(key, []).append(value)
    return {k: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for k, v in found.items()}


def best_config(config: Config, values: dict[str, Any], preset_config: Config) -> Config:
    """The setting as a config for launchers/train.py: the preset's checkpoints, tracker, report and threads again."""
    best = apply_values(config, {k: v for k, v in values.items() if k != "train.seed"})
    best.train.keep, best.train.tracker = preset_config.train.keep, preset_config.train.tracker
    best.train.report, best.train.threads = preset_config.train.report, preset_config.train.threads
    return best


# ---------------------------------------------------------------------------------------------- the search


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


def load_base(arguments: Arguments) -> Config:
    return load_config(arguments.config) if arguments.config else preset(arguments.preset)


def check_resume(output: Output, identity: dict[str, Any], arguments: Arguments) -> bool:
    """Whether --output holds a search. Raises BadInput when --resume is not given then, or it is another search."""
    text = output.read("search.json")
    if text is None:
        return False
    before, now = json.loads(text), json.loads(json.dumps(identity))
    if not arguments.resume:
        raise BadInput(f"--output {output.url} holds a search: add --resume to go on with it, or name another place")
    for name, value in before.items():
        if now[name] != value:
            raise BadInput(
                f"--resume: the search in {output.url} has {name} {value!r}, not {now[name]!r}: use that value, or "
                "another --output"
            )
    return True


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
