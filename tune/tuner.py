"""One experiment of Ray Tune: what it trains, how settings are chosen, its run, and the result of each trial."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import to_yaml
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.ray import resources
from tune.options import Arguments
from tune.results import ENDED, FAILED, STOPPED, UNFINISHED, TrialResult
from tune.space import Space, clip, domains, mutable

MOST_FAILURES = 3
"""Times that a trial whose process died is started again from its last checkpoint."""
WAITING = ("hyperband", "pbt")
"""Algorithms whose trials are paused until others have come as far."""
KEPT_FOR_CLONES = 4
"""Checkpoints of a trial under PBT: one may be cloned while the next are written."""


def prepare_tune() -> None:
    """Set what Ray Tune reads from the environment; this must come before Ray starts."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # see Interrupt
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # trials that have not begun
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a killed driver forgets
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # it is a few kB


def trials_at_a_time(arguments: Arguments) -> int:
    """Return how many trials run at a time. Raises BadInput when none fits."""
    cpus, gpus = resources()
    fit = int(cpus / arguments.cpus + 1e-6)
    if arguments.gpus:
        fit = min(fit, int(gpus / arguments.gpus + 1e-6))
    if not fit:
        raise BadInput(
            f"a trial with --cpus {arguments.cpus:g} --gpus {arguments.gpus:g} does not fit: there are {cpus:g} CPUs "
            f"and {gpus:g} GPUs"
        )
    return min(fit, arguments.concurrent or fit)


def make_trainable(config: Config, arguments: Arguments, space: Space) -> Any:
    """Return what Tune trains: `Trial` with the shared config and the resources of each trial."""
    from ray.tune import with_parameters, with_resources

    from tune.trial import Trial

    trainable = with_parameters(
        Trial,
        base=to_yaml(config),
        processes=arguments.processes,
        threads=config.train.threads,
        may_change=tuple(filter(mutable, space)) if arguments.algorithm == "pbt" else (),
    )
    return with_resources(trainable, {"cpu": cpus_of_trial(arguments, resources()[0]), "gpu": arguments.gpus})


def cpus_of_trial(arguments: Arguments, total: float) -> float:
    """Return the CPUs that Ray sets apart for a trial, of `total`: --cpus, or so many that --concurrent trials fit.

    A limit on the trials themselves would never end where these wait for others that may not begin."""
    if not arguments.concurrent or arguments.algorithm not in WAITING:
        return arguments.cpus
    return max(arguments.cpus, total / arguments.concurrent)


def make_algorithm(space: Space, arguments: Arguments, validations: int, start: dict[str, Any]) -> tuple[Any, Any]:
    """Return the search algorithm and the scheduler of --algorithm.

    `validations` is their number in a whole trial, `start` the setting of the first trial. Raises BadInput for pbt when
    the space holds nothing that can change during training."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, HyperBandScheduler, PopulationBasedTraining
    from ray.tune.search import BasicVariantGenerator

    name = arguments.algorithm
    if name.startswith("optuna"):
        from ray.tune.search.optuna import OptunaSearch

        both = name == "optuna-both"
        search: Any = OptunaSearch(
            space=OptunaSearch.convert_search_space(domains(space)),
            metric=["image_to_text", "text_to_image"] if both else "best",
            mode=["max", "max"] if both else "max",
            points_to_evaluate=[start],
            seed=arguments.seed,
        )
    else:
        most = 0 if name in WAITING else arguments.concurrent
        search = BasicVariantGenerator(points_to_evaluate=[start], random_state=arguments.seed, max_concurrent=most)
    unit: dict[str, Any] = {"time_attr": "training_iteration"}  # one validation
    scheduler: Any
    if name == "random":
        scheduler = FIFOScheduler()
    elif name == "hyperband":
        scheduler = HyperBandScheduler(**unit, max_t=validations, reduction_factor=arguments.reduction)
    elif name == "pbt":
        changing = {p: d for p, d in domains(space).items() if mutable(p)}
        if not changing:
            raise BadInput("--algorithm pbt mutates loss weights, rates and dropout: the search space has none of them")
        scheduler = PopulationBasedTraining(
            **unit,
            perturbation_interval=arguments.grace,
            hyperparam_mutations=changing,
            custom_explore_fn=lambda values: clip(space, values),
        )
    else:
        scheduler = AsyncHyperBandScheduler(
            **unit,
            max_t=validations,
            grace_period=min(arguments.grace, validations),
            reduction_factor=arguments.reduction,
        )
    return search, scheduler


def ray_filesystem(output: FileStore) -> dict[str, Any]:
    """Return the argument that gives Ray Tune the file system of OUTPUT; none where it is local."""
    if output.local:
        return {}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_filesystem": PyFileSystem(FSSpecHandler(output.filesystem))}


def run_tuner(
    name: str,
    output: FileStore,
    trainable: Any,
    settings: dict[str, Any],
    param_space: dict[str, Any],
    total: int,
    checkpoint_every: int,
    keep: int = 1,
) -> list[tuple[Any, Any]]:
    """Run, or go on with, the experiment OUTPUT/`name`.

    Returns (Tune's trial, its result) in the order in which the trials were made. `settings` are those of a TuneConfig;
    `total` trials are expected. A checkpoint is written every `checkpoint_every` validations; the last `keep` stay."""
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

    from tune.progress import ProgressCallback

    filesystem = ray_filesystem(output)
    experiment = f"{output.path}/{name}"
    if Tuner.can_restore(experiment, **filesystem):
        tuner = Tuner.restore(experiment, trainable, param_space=param_space, **filesystem)
    else:
        tuner = Tuner(
            trainable,
            param_space=param_space,
            tune_config=TuneConfig(
                metric="best", mode="max", reuse_actors=True, trial_dirname_creator=lambda t: t.trial_id, **settings
            ),
            run_config=RunConfig(
                name=name,
                storage_path=output.path,
                **filesystem,
                verbose=0,
                callbacks=[ProgressCallback(name, total)],
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
    """Turns Ctrl-C and SIGTERM into SIGUSR1, on which Tune ends its run cleanly, and notes that it was one of them."""

    def __init__(self) -> None:
        self.seen = False

    def _handle(self, number: int, frame: Any) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once
        os.kill(os.getpid(), signal.SIGUSR1)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals while Tune runs; elsewhere both raise KeyboardInterrupt."""
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
"""That of this process: a signal ends the experiment that runs, and those that would follow."""


def trial_result(name: str, trial: Any, result: Any, validations: int) -> TrialResult:
    """Return what is kept of Tune's `trial` and its `result`; a whole trial has so many `validations`."""
    values = dict(trial.config.get("values", trial.config))
    last = trial.last_result or {}
    rows = result.metrics_dataframe
    kept = TrialResult(name, values, UNFINISHED, node=str(last.get("node", ""))[:8])
    if rows is not None and len(rows):
        kept.seconds, kept.step_seconds = float(rows["time_this_iter_s"].sum()), float(rows["step_s"].sum())
        rows = rows.drop_duplicates("training_iteration", keep="last")  # what was lost in a crash and done again
        if not last.get("failed"):
            kept.curve = [(float(e), float(v)) for e, v in zip(rows["epoch"], rows["score"], strict=True)]
    if trial.status == "ERROR":
        kept.status = FAILED
        kept.failed = str(result.error).strip().splitlines()[-1] if result.error else "its process died too often"
    elif last.get("failed"):
        kept.status, kept.failed = FAILED, last["failed"]
    elif last.get("done"):  # of trials that an interruption cut, Tune says TERMINATED too
        kept.status = ENDED if last.get("training_iteration", 0) >= validations else STOPPED
    kept.best = float(last.get("best", 0.0))
    kept.image_to_text = float(last.get("image_to_text", 0.0))
    kept.text_to_image = float(last.get("text_to_image", 0.0))
    kept.epochs = float(last.get("epoch", 0.0))
    return kept
