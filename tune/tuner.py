"""One experiment of Ray Tune: what it trains, how settings are chosen, and its run."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import to_yaml
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.ray import resources
from tune.options import Arguments
from tune.record import Record
from tune.space import Space, clip, domains, mutable, outside_of

MOST_FAILURES = 3
"""Times that a trial whose process died is started again from its last checkpoint."""
WAITING = ("hyperband", "pbt")
"""Algorithms whose trials are paused until others have come as far."""
KEPT, KEPT_FOR_CLONES = 2, 4
"""Checkpoints of a trial: its record names one while the next is written; under PBT one may be cloned meanwhile."""


def prepare_tune() -> None:
    """Set what Ray Tune reads from the environment; this must come before Ray starts."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # see Interrupt
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # trials that have not begun


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


def make_trainable(
    config: Config, arguments: Arguments, space: Space, output: FileStore, known: dict[int, Record]
) -> Any:
    """Return what Tune trains: `Trial` with the shared config and the resources of each trial.

    `known`: what was trained before, from whose checkpoints in `output` its trials go on."""
    from ray.tune import with_parameters, with_resources

    from tune.trial import Trial, setting_key

    left = [record for record in known.values() if record.checkpoint and not record.finished]

    trainable = with_parameters(
        Trial,
        base=to_yaml(config),
        processes=arguments.processes,
        threads=config.train.threads,
        may_change=tuple(filter(mutable, space)) if arguments.algorithm == "pbt" else (),
        starts={setting_key(record.values): f"{output.path}/{record.checkpoint}" for record in left},
        filesystem=ray_filesystem(output),
    )
    return with_resources(trainable, {"cpu": cpus_of_trial(arguments, resources()[0]), "gpu": arguments.gpus})


def cpus_of_trial(arguments: Arguments, total: float) -> float:
    """Return the CPUs that Ray sets apart for a trial, of `total`: --cpus, or so many that --concurrent trials fit.

    A limit on the trials themselves would never end where these wait for others that may not begin."""
    if not arguments.concurrent or arguments.algorithm not in WAITING:
        return arguments.cpus
    return max(arguments.cpus, total / arguments.concurrent)


def make_search(space: Space, arguments: Arguments, known: dict[int, Record], settings: list[dict[str, Any]]) -> Any:
    """Return the search algorithm of --algorithm, which tries `settings` first; for optuna others follow, of which it
    is told what is known."""
    from ray.tune.search import BasicVariantGenerator

    name = arguments.algorithm
    if not name.startswith("optuna"):
        most = 0 if name in WAITING else arguments.concurrent
        return BasicVariantGenerator(points_to_evaluate=settings, random_state=arguments.seed, max_concurrent=most)
    from ray.tune.search.optuna import OptunaSearch

    both = name == "optuna-both"
    search: Any = OptunaSearch(
        space=OptunaSearch.convert_search_space(domains(space)),
        metric=["image_to_text", "text_to_image"] if both else "best",
        mode=["max", "max"] if both else "max",
        points_to_evaluate=settings,
        seed=arguments.seed + len(known),  # else it would draw once more what it has drawn
    )
    _tell_optuna(search, space, [record for record in known.values() if record.finished and not record.failed], both)
    return search


def _tell_optuna(search: Any, space: Space, records: list[Record], both: bool) -> None:
    """Tell a search by optuna what trials have come to; a setting outside the space cannot be told."""
    import optuna

    for record in records:
        last = record.last
        if not outside_of(space, record.values):
            scores = [last["image_to_text"], last["text_to_image"]] if both else [last["best"]]
            told = optuna.trial.create_trial(values=scores, params=record.values, distributions=search._space)
            search._ot_study.add_trial(told)


def make_scheduler(space: Space, arguments: Arguments, validations: int, known: dict[int, Record]) -> Any:
    """Return the scheduler of --algorithm, which has seen the trials that are `known` to have ended.

    `validations` is their number in a whole trial. Raises BadInput for pbt when the space holds nothing that can change
    during training."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, HyperBandScheduler, PopulationBasedTraining

    name = arguments.algorithm
    common: dict[str, Any] = {"time_attr": "validation", "metric": "best", "mode": "max"}
    if name == "random":
        return FIFOScheduler()
    if name == "hyperband":
        return HyperBandScheduler(**common, max_t=validations, reduction_factor=arguments.reduction)
    if name == "pbt":
        changing = {p: d for p, d in domains(space).items() if mutable(p)}
        if not changing:
            raise BadInput("--algorithm pbt mutates loss weights, rates and dropout: the search space has none of them")
        return PopulationBasedTraining(
            **common,
            perturbation_interval=arguments.grace,
            hyperparam_mutations=changing,
            custom_explore_fn=lambda values: clip(space, values),
        )
    grace = min(arguments.grace, validations)
    scheduler = AsyncHyperBandScheduler(
        **common, max_t=validations, grace_period=grace, reduction_factor=arguments.reduction
    )
    for record in known.values():
        if record.finished and not record.failed:
            trial = SimpleNamespace(trial_id=f"known {record.number}")
            scheduler.on_trial_add(None, trial)
            for row in record.validations:
                scheduler.on_trial_result(None, trial, row)
    return scheduler


def ray_filesystem(output: FileStore) -> Any:
    """Return the file system of OUTPUT for Ray Tune, None where it is local."""
    if output.local:
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(output.filesystem))


def run_tuner(
    name: str,
    output: FileStore,
    trainable: Any,
    settings: dict[str, Any],
    param_space: dict[str, Any],
    numbers: list[int],
    known: dict[int, Record],
    checkpoint_every: int,
    keep: int = KEPT,
) -> None:
    """Run the trials with these `numbers` of the experiment `name`, which Tune makes in this order.

    `known` is what is known of all its trials, and holds more at the end. `settings` are those of a TuneConfig. A
    checkpoint is written every `checkpoint_every` validations; the last `keep` stay."""
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

    from tune.progress import ProgressCallback
    from tune.recorder import Recorder

    if not numbers:
        return
    filesystem, end = ray_filesystem(output), time.monotonic() + settings.get("time_budget_s", math.inf)
    ended = sum(record.finished for record in known.values())
    recorder = Recorder(output, name, numbers, known, lambda: INTERRUPT.seen or time.monotonic() >= end)
    tuner = Tuner(
        trainable,
        param_space=param_space,
        tune_config=TuneConfig(reuse_actors=True, trial_dirname_creator=lambda t: t.trial_id, **settings),
        run_config=RunConfig(
            name=_unused(output, name),
            storage_path=output.path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[ProgressCallback(name, ended + len(numbers), ended), recorder],
            failure_config=FailureConfig(max_failures=MOST_FAILURES),
            checkpoint_config=CheckpointConfig(
                num_to_keep=keep, checkpoint_frequency=checkpoint_every, checkpoint_at_end=True
            ),
        ),
    )
    with INTERRUPT.watching():
        tuner.fit()


def _unused(output: FileStore, name: str) -> str:
    """Return a name for Tune's own folder in OUTPUT that no start before has used: NAME, NAME-2, ..."""
    names, taken = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2))), output.own_names()
    return next(each for each in names if each not in taken)


@contextlib.contextmanager
def run_of(output: FileStore, record: Record) -> Iterator[Path]:
    """Give the folder of a trial's run; of a remote output, a copy."""
    from ray.tune import Checkpoint

    path, filesystem = f"{output.path}/{record.checkpoint}", ray_filesystem(output)
    with contextlib.nullcontext(path) if output.local else Checkpoint(path, filesystem).as_directory() as folder:
        yield Path(folder)


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
