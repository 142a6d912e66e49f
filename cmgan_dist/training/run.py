"""How a run is made ready: its folder, data and networks, and the checkpoint from which it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cmgan_dist.config.fields import CONFIG_NAME, Config, micro_batch
from cmgan_dist.config.load import LOSS_TERMS, check_places, load_config, to_yaml, validate
from cmgan_dist.config.paths import get_value, settings
from cmgan_dist.data.differences import other_class
from cmgan_dist.data.folder import check_file, check_link, check_output
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.data.order import steps_for
from cmgan_dist.data.origin import absolute_data, fingerprint_of
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.source import public_config, public_data
from cmgan_dist.data.stream import Stream
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.errors import BadInput, Unreadable
from cmgan_dist.files import write_atomic
from cmgan_dist.jobs.cores import take_threads
from cmgan_dist.jobs.lock import lock_name, owning
from cmgan_dist.jobs.staging import remove_leftovers
from cmgan_dist.models.saved import BEST, SPEC_NAME, ModelSpec, describe_model, keep_weights, read_model
from cmgan_dist.models.vocabulary import Vocabulary
from cmgan_dist.training.checkpoint import Checkpointer, Progress, checkpoints_of, latest, read_checkpoint
from cmgan_dist.training.recorder import METRICS_NAME, Recorder
from cmgan_dist.training.schedule import rate
from cmgan_dist.training.state import Networks, build_networks

log = logging.getLogger(__name__)

VOCABULARY_SAMPLES = 200_000
"""Samples of the training split whose words make the vocabulary of the text CNN."""
CLASS_TERMS = ("classification", "class_contrastive")
"""Weights of the generator's terms that are left out where the data has no labels."""
LOGS = "logs"
"""Folder in a run of what processes say under SLURM; alone, it is of starts that came to nothing."""
LOCK = "train"
"""The kind of work for which a run owns its folder (`jobs.lock`)."""


def check_same_run(run: Path, config: Config, may_change: Sequence[str] = ()) -> Config | None:
    """Return the config that the run in a folder had so far, None where there is none.

    `may_change`: dotted names of settings that may differ beside those that every resumed run may change. Raises
    BadInput when `config` would go on with another model, data or order."""
    path = run / CONFIG_NAME
    check_link(path)
    if not os.path.lexists(path):
        if checkpoints_of(run / "checkpoints"):
            raise BadInput(
                f"{run} has checkpoints and no {CONFIG_NAME}: restore it ({BEST}/{CONFIG_NAME} is a copy), or begin "
                "anew by --resume never"
            )
        return None
    before = load_config(path)
    for name, setting in settings().items():
        old, new = get_value(before, name), get_value(config, name)
        if old != new and not setting.resumable and name not in may_change:
            raise BadInput(
                f"{run} was trained with {name} {old!r}, not {new!r}: use that value, another --output, or "
                "--resume never"
            )
    return before


def say_jump(before: Config, config: Config, progress: Progress) -> None:
    """Log it where another length of the run changes the learning rate at the sample at which it goes on."""
    epoch = progress.position / progress.epoch_samples
    old, new = (rate(config.optim, epoch, epochs) for epochs in (before.train.epochs, config.train.epochs))
    if abs(new - old) > 0.01:
        first, then = (config.optim.generator_lr * factor for factor in (old, new))
        log.warning(
            "train.epochs is %g and was %g: by the %s schedule the learning rate jumps from %.3g to %.3g at epoch %g",
            config.train.epochs, before.train.epochs, config.optim.schedule, first, then, epoch,
        )  # fmt: skip


def set_aside(run: Path) -> None:
    """Move what an earlier run left in the folder `run` to RUN/earlier-N, so that nothing is lost.

    Raises BadInput where the folder holds other things than a run."""
    found = sorted(run.iterdir()) if run.is_dir() else []
    inside = [path for path in found if not path.name.startswith("earlier-") and path.name != lock_name(LOCK)]
    if {path.name for path in inside} <= {LOGS}:
        return
    if not {CONFIG_NAME, BEST, "checkpoints"} & {path.name for path in inside}:
        raise BadInput(f"--output {run} holds what is no run ({inside[0].name}): name a new folder")
    target = next(path for n in itertools.count(1) if not os.path.lexists(path := run / f"earlier-{n}"))
    target.mkdir()
    for path in inside:
        shutil.move(path, target / path.name)
    log.warning("an earlier run was moved to %s", target)


def clear_way(run: Path, resume: str) -> None:
    """Set an earlier run aside where this one begins anew: as `resume` asks, or because its checkpoints are gone and
    its model in best/ would be written over.

    Raises BadInput as `set_aside` and `checkpoints_of` do."""
    lost = os.path.lexists(run / BEST / SPEC_NAME) and not checkpoints_of(run / "checkpoints")
    if lost and resume == "auto":
        log.warning("%s has a model in %s and no checkpoints to go on from: it begins anew", run, BEST)
    if lost or resume == "never":
        set_aside(run)


def check_run_folder(run: Path) -> None:
    """Raises BadInput where the folder of a run, or its best/, has a link that leads nowhere, which would be written
    over, or something else stands in the place of best/ or of metrics.jsonl."""
    best = run / BEST
    for folder in (run, best):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            check_link(path)
    if best.exists() and not best.is_dir():
        raise BadInput(f"{best} is no folder: move it away, so that the best model can be kept there")
    check_file(run / METRICS_NAME, "lines")


def check_scoring(config: Config, data: DataSpec) -> None:
    """Raises BadInput when `config.eval` asks for what needs classes and the data has none."""
    for name, value in (("eval.score", "posterior"), ("eval.objective", "class"), ("eval.objective", "both")):
        if data.label_kind == "none" and get_value(config, name) == value:
            raise BadInput(f"{name} is {value}, but the data has no labels: set it to auto")


def check_losses(config: Config, data: DataSpec) -> None:
    """Raises BadInput when every loss term of the generator that is on needs classes and the data has none."""
    chosen = [name for name in LOSS_TERMS if getattr(config.loss, name)]
    if data.label_kind == "none" and not set(chosen) - set(CLASS_TERMS):
        of_classes, free = (
            ", ".join(f"loss.{name}" for name in names)
            for names in (chosen, [name for name in LOSS_TERMS if name not in CLASS_TERMS])
        )
        raise BadInput(f"only {of_classes} trains the generator, but the data has no labels: set one of {free} above 0")


def make_vocabulary(readers: list[ShardReader], config: Config) -> Vocabulary:
    """Return the vocabulary of the training split, by the words of its first VOCABULARY_SAMPLES samples."""
    samples = itertools.islice(itertools.chain.from_iterable(readers), VOCABULARY_SAMPLES)
    texts = [text for sample in samples if isinstance(sample.texts, list) for text in sample.texts]
    return Vocabulary.build(texts, config.model.text.min_count, config.model.text.vocabulary_size)


@dataclass
class Run:
    """A run that is ready to go on from `progress`."""

    config: Config
    folder: Path
    """The folder RUN, which holds everything that the run writes."""
    stream: Stream
    """The batches of the training split."""
    val_reader: ShardReader
    """The samples of the validation split."""
    parallel: Parallel
    networks: Networks
    recorder: Recorder
    checkpointer: Checkpointer
    progress: Progress
    """Where the run stands; the loop moves it on."""
    spec: ModelSpec
    """What best/ says of the model."""
    vocabulary: Vocabulary | None
    """The words of the text CNN; None without one."""
    held: contextlib.ExitStack
    """What is given back when the run ends: the lock on its folder."""
    on_validation: Callable[[Run, dict[str, float]], None] | None = None
    """Called on every process after a validation and the checkpoint that is due with it; gets "score" and metrics."""
    bad: int = 0
    """Samples replaced on this process since the last log line."""
    skipped: dict[str, Tensor | float] = field(default_factory=dict)
    """skipped/PHASE in fp16: steps left out since the last log line."""

    @property
    def epoch(self) -> float:
        """Where the run stands, in epochs."""
        return self.progress.position / self.progress.epoch_samples

    @property
    def total(self) -> int:
        """Samples of the whole run."""
        return self.samples(self.config.train.epochs)

    def samples(self, epochs: float) -> int:
        """Return how many samples `epochs` are, in whole global batches."""
        batch = self.config.stream.global_batch
        return steps_for(epochs, self.stream.epoch_samples, batch) * batch

    def due(self, every: int, ahead: bool = False) -> bool:
        """Return whether the batch that has just ended crosses a multiple of `every` samples.

        `ahead`: the batch that is under way, in its place."""
        batch = self.config.stream.global_batch
        position = self.progress.position + batch * ahead
        return position // every > (position - batch) // every


def best_is_whole(run: Path) -> bool:
    """Return whether RUN/best is whole; where it is not, the log says why and that it is made anew.

    Raises Unreadable where nobody can tell."""
    try:
        read_model(run)
    except Unreadable:
        raise
    except BadInput as error:
        log.warning("%s: a model is kept there again by the next validation", error)
        return False
    return True


def other_data(before: Progress, start: Progress) -> str:
    """Return in what the data of a `start` is another than a run had `before`, "" where it is the same."""
    if before.epoch_samples != start.epoch_samples:
        return f"epochs of {before.epoch_samples} samples, not {start.epoch_samples}"
    if before.data != start.data:
        return "shards with other checksums"
    if before.validation and before.validation != start.validation:
        return "a validation split with other checksums"
    if before.label_kind and before.label_kind != start.label_kind:
        return f"label_kind {before.label_kind}, not {start.label_kind}"
    if before.classes is None or start.classes is None:
        return ""
    return other_class(start.classes, before.classes)


def go_on(run: Path, networks: Networks, start: Progress, parallel: Parallel) -> Progress:
    """Load the newest whole checkpoint of a run into its networks and return where it stands; `start` where there is
    none, which says of what data the run is.

    Every process calls it; the first one looks, so that all take the same. Raises BadInput when the checkpoint is of
    another model or other data, or there are checkpoints and none can be used."""
    found = parallel.on_main(lambda: latest(run))
    if found is None:
        return start
    progress, tensors = read_checkpoint(found)
    what = other_data(progress, start)
    if what:
        raise BadInput(
            f"{run} was trained on other data ({what}): use the same data, another --output, or --resume never",
            everywhere=True,
        )
    progress.validation, progress.classes, progress.label_kind = start.validation, start.classes, start.label_kind
    networks.load(tensors, str(found))
    if not parallel.on_main(lambda: best_is_whole(run)):
        progress.best = None  # the next validation keeps what it finds
    return progress


def beginning(stream: Stream, val_reader: ShardReader, data: DataSpec) -> Progress:
    """Return where a run on this data begins, which knows what data it is."""
    return Progress(
        epoch_samples=stream.epoch_samples,
        data=fingerprint_of(reader.shards for reader in stream.readers),
        validation=fingerprint_of([val_reader.shards]),
        classes=data.classes,
        label_kind=data.label_kind,
    )


def fill_folder(run: Path, config: Config, spec: ModelSpec) -> None:
    """Write into the folder of a run what is there from its start on: its config and the weights of its frozen
    backbones, whose places in `spec` change. Raises BadInput, and OSError, where that fails."""
    write_atomic(run / CONFIG_NAME, to_yaml(public_config(config)))
    remove_leftovers(run)
    keep_weights(run / BEST, spec)


def prepare(config: Config, resume: str, may_change: Sequence[str] = ()) -> Run:
    """Return the run of `config`, ready for its next batch; `resume` is auto or never, as in `loop.train`.

    `may_change`: see `check_same_run`. Raises BadInput for whatever config, data or an earlier run make impossible."""
    validate(config)
    check_places(config)
    config = dataclasses.replace(config, data=absolute_data(config.data))  # who reads the run is elsewhere
    if resume not in ("auto", "never"):
        raise BadInput(f"resume is {resume!r}, expected auto or never")
    run = Path(config.output)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    size = config.model.image.image_size
    micro = dataclasses.replace(config.stream, global_batch=micro_batch(config))
    stream = Stream(config.data, micro, seed=config.train.seed, image_size=size, rank=rank, world=world)
    val_reader = stream.readers[0].of(config.stream.val_split)
    data = DataSpec.of(stream.manifest)
    check_output(run, CONFIG_NAME)
    check_scoring(config, data)
    check_losses(config, data)
    before = check_same_run(run, config, may_change) if resume == "auto" else None
    tracker = config.train.tracker if rank == 0 else "none"
    parallel = Parallel(
        config.train.precision, tracker, str(run), config.train.timeout_s, config.train.reduce_precision
    )
    with contextlib.ExitStack() as held:
        parallel.on_main(lambda: held.enter_context(owning(run, LOCK)))
        parallel.on_main(lambda: clear_way(run, resume))
        parallel.on_main(lambda: check_run_folder(run))
        take_threads(parallel.local_world, config.train.threads, say=parallel.main)
        vocabulary = make_vocabulary(stream.readers, config) if config.model.text.name == "cnn" else None
        networks = build_networks(config, data, vocabulary, parallel)
        progress = beginning(stream, val_reader, data)
        if resume == "auto":
            progress = go_on(run, networks, progress, parallel)
        if before is not None and progress.position and parallel.main:
            say_jump(before, config, progress)
        manifest = stream.manifest
        spec = describe_model(config, data, networks.generator, manifest.name, manifest.attribution, manifest.details)
        parallel.on_main(lambda: fill_folder(run, config, spec))
        parallel.start_trackers("tensorboard", {"preset": config.preset, "data": public_data(config.data)})
        checkpointer = Checkpointer(
            run, config.train.keep, rank=parallel.rank, world=parallel.world, group=parallel.new_group()
        )
        checkpointer.newest = progress.position or None
        return Run(
            config=config,
            folder=run,
            stream=stream,
            val_reader=val_reader,
            parallel=parallel,
            networks=networks,
            recorder=Recorder(run, main=parallel.main, track=parallel.track),
            checkpointer=checkpointer,
            progress=progress,
            spec=spec,
            vocabulary=vocabulary,
            held=held.pop_all(),
        )
