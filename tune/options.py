"""What a search is asked for, and the config that its trials share."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import load_config, validate
from cmgan_dist.config.paths import get_value, settings
from cmgan_dist.config.presets import preset
from cmgan_dist.data.origin import absolute_data
from cmgan_dist.data.source import public_data, public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json
from tune.record import FOLDER

log = logging.getLogger(__name__)

SAME = ("preset", "config", "data", "trials", "algorithm", "epochs", "val_every", "grace", "reduction", "seed")
"""Fields that --resume must find as they were."""
OF_MACHINE: tuple[str, ...] = ("train.threads", "train.timeout_s", "stream.workers", "stream.cache")
OF_MACHINE += ("stream.cache_gib", "stream.retries", "stream.timeout_s")
"""Settings by which data is read and machines are used: --resume may find others."""
OF_DATA = ("epoch_samples", "data", "validation", "label_kind", "classes")
"""Fields of a run's `Progress` that say what data it is of."""
LEAST = 0.0001
"""Ray counts in so fine steps."""
RANGES: dict[str, tuple[float, float]] = {
    "trials": (1, 10**6),
    "epochs": (0, 10**9),
    "val_every": (0, 10**9),
    "grace": (1, 10**6),
    "reduction": (2, 10**6),
    "processes": (1, 10**4),
    "cpus": (LEAST, 10**4),
    "gpus": (0, 10**4),
    "concurrent": (0, 10**6),
    "checkpoint_every": (1, 10**6),
    "confirm": (0, 10**6),
    "confirm_top": (1, 10**6),
    "time_budget_s": (0, 10**9),
    "nodes": (1, 10**6),
    "seed": (0, 2**32 - 1),
}
"""The least and the most that a flag may be."""


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
    """Name of the test split."""
    time_budget_s: float = 0.0
    """Stop the search after so many seconds; 0 is no limit."""
    resume: bool = False
    """Go on with the search in --output."""
    address: str = ""
    """Ray cluster: auto, or its address; "" starts Ray on this machine."""
    nodes: int = 1
    """Wait until so many nodes have joined the cluster."""
    seed: int = 0
    """Seed of the settings that are drawn."""


def check_numbers(arguments: Arguments) -> None:
    """Raises BadInput naming the first flag whose number is out of its range."""
    for name, (low, high) in RANGES.items():
        value = getattr(arguments, name)
        if not low <= value <= high:  # nan is in no range
            raise BadInput(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}")


def base_config(arguments: Arguments) -> Config:
    """Return the config that all trials share. Raises BadInput naming the flag that is wrong."""
    if bool(arguments.preset) == bool(arguments.config):
        raise BadInput("name either --preset or --config: see tune/search.py --help")
    check_numbers(arguments)
    if 0 < arguments.gpus < LEAST or (arguments.gpus > 1 and arguments.gpus % 1):
        raise BadInput(f"--gpus is {arguments.gpus}, expected 0 to 1 in steps of {LEAST}, or a whole number")
    if arguments.gpus and arguments.processes > 1 and arguments.gpus < arguments.processes:
        raise BadInput(f"--gpus {arguments.gpus:g} is too few for --processes {arguments.processes}: give one each")
    if arguments.concurrent and arguments.address and arguments.algorithm in ("hyperband", "pbt"):
        raise BadInput(
            f"--concurrent cannot be kept on a cluster by --algorithm {arguments.algorithm}, whose trials wait for "
            "each other: leave it out and set --cpus so that no more trials fit"
        )
    config = load_base(arguments)
    config.data = absolute_data(arguments.data or config.data)
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


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that every trial shares, by dotted name: all that decides what a trial comes to."""
    beside = ("preset", "data", "output", *OF_MACHINE)
    return {name: get_value(config, name) for name in settings() if name not in beside}


def check_data(config: Config, test_split: str) -> tuple[int, dict[str, Any]]:
    """Return the number of validations in a whole trial, and OF_DATA: what data it is, wherever that lies.

    Raises BadInput for data that no trial could train on, be validated on or, when `test_split` is named, tested on."""
    from cmgan_dist.data.manifest import DataSpec
    from cmgan_dist.data.order import steps_for
    from cmgan_dist.data.stream import Stream
    from cmgan_dist.training.run import beginning

    stream = Stream(config.data, config.stream, seed=0, image_size=config.model.image.image_size, rank=0, world=1)
    validation = stream.readers[0].of(config.stream.val_split)
    if test_split:
        validation.of(test_split)
    start = beginning(stream, validation, DataSpec.of(stream.manifest))
    batch = config.stream.global_batch
    total, every = (steps_for(e, stream.epoch_samples, batch) for e in (config.train.epochs, config.train.val_every))
    return -(-total // every), {name: getattr(start, name) for name in OF_DATA}


def load_base(arguments: Arguments) -> Config:
    """Return the config that the search starts from: the preset's or the file's."""
    return load_config(arguments.config) if arguments.config else preset(arguments.preset)


def check_resume(output: FileStore, identity: dict[str, Any], arguments: Arguments) -> bool:
    """Return whether --output holds a search; `identity` says of this one what --resume must find as it was. Where it
    holds none, --resume begins one, as it must for a job that SLURM starts again, and the log says so.

    Raises BadInput when it holds one and --resume is not given, that one is another search or damaged, or it holds
    something else."""
    try:
        text = output.read("search.json")
    except FileNotFoundError:
        output.check_output("search.json")
        if records := output.names(FOLDER):  # of which search, nobody knows: they must not become part of this one
            raise BadInput(
                f"{output.location(f'{FOLDER}/{records[0]}')} is of a search whose search.json is gone: restore it, or "
                "name another --output"
            ) from None
        if arguments.resume:
            log.warning(
                "--resume: --output %s holds no search to go on with, so a new one begins", public_url(output.url)
            )
        return False
    place, now = public_url(output.url), json.loads(json.dumps(identity))
    try:
        before = parse_json(text)
    except ValueError:
        before = None
    if not isinstance(before, dict) or set(before) != set(now):
        raise BadInput(
            f"{output.location('search.json')} is damaged or of another version, so that the search there cannot go "
            "on: name another --output"
        )
    if not arguments.resume:
        raise BadInput(f"--output {place} holds a search: add --resume to go on with it, or name another place")
    if isinstance(before.get("data"), str):
        before["data"] = public_data(before["data"])
    for name, value in before.items():
        if now[name] != value:
            raise BadInput(f"--resume: the search in {place} has {_differing(name, value, now[name])}")
    return True


def _differing(name: str, before: Any, now: Any) -> str:
    """Return in what a search differs from the one that --resume found, and what to do."""
    if name != "fingerprint":
        return f"{name} {before!r}, not {now!r}: use that value, or another --output"
    from cmgan_dist.training.checkpoint import Progress
    from cmgan_dist.training.run import other_data

    try:
        what = other_data(Progress(**before), Progress(**now))
    except TypeError:  # a field is of another kind
        what = "a damaged fingerprint in search.json"
    return f"other data ({what}): use the same data, or another --output"
