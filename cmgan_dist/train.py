"""The training loop: batches in, phases over them, validation, checkpoints.

Everything random is seeded from (seed, position, rank), and a checkpoint holds the rest of the state: a run that was
killed and resumed ends bitwise like one that was not (on the same kind of CPU, with the same processes and threads).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from cmgan_dist.checkpoint import Checkpointer, Progress, latest, read_checkpoint
from cmgan_dist.config.fields import CONFIG_NAME, Config, OptimConfig, micro_batch
from cmgan_dist.config.load import load_config, to_yaml, validate
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.data.order import mix, steps_for
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.stream import Stream
from cmgan_dist.distributed.engine import AdamSettings, Engine
from cmgan_dist.distributed.join import is_lost_process
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.embed import embed_split
from cmgan_dist.errors import EXIT_DONE, EXIT_SIGNALLED, BadInput, LostProcess
from cmgan_dist.files import write_atomic
from cmgan_dist.metrics import evaluate
from cmgan_dist.models.backbones import TextInput
from cmgan_dist.models.discriminators import NAMES, build_discriminators
from cmgan_dist.models.generator import Generator, OneSide, Side, build_generator
from cmgan_dist.models.saved import SPEC_NAME, VOCABULARY_NAME, check_shapes, save_best, stored_tensors
from cmgan_dist.models.vocabulary import Vocabulary
from cmgan_dist.phases import Phase, Scene, Wrong, not_finite, phase_table, pick_wrong, run_phase
from cmgan_dist.record import Clock, Recorder, tracing

log = logging.getLogger(__name__)

MAY_CHANGE = (
    *("train", "eval", "data", "output", "preset", "stream.workers", "stream.max_bad_share"),
    *("stream.cache", "stream.cache_gib", "stream.retries", "stream.timeout_s"),
    *("optim.generator_lr", "optim.discriminator_lr", "optim.clip", "model.kernels"),
)
"""What a resumed run may change; train.seed may not. Lower rates are what a run that diverged goes on with."""
VOCABULARY_SAMPLES = 200_000
"""Samples of the training split whose words make the vocabulary of the text CNN."""


# ---------------------------------------------------------------------------------------------- set-up


def rate(config: OptimConfig, epoch: float, epochs: float) -> float:
    """Factor of the learning rates at a point of the run; both in (fractional) epochs."""
    warmup = min(1.0, (epoch + 1e-9) / config.warmup_epochs) if config.warmup_epochs else 1.0
    if config.schedule == "halve":
        return warmup * 0.5 ** math.floor(epoch / config.halve_every + 1e-9)
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))
    return warmup


def check_same_run(run: Path, config: Config, may_change: Sequence[str] = MAY_CHANGE) -> None:
    """Raises BadInput when `config` would go on with another model, data or order than the run has.

    `may_change`: dotted fields, or whole sections, that may differ."""
    path = run / CONFIG_NAME
    if not path.is_file():
        return
    before, now = dataclasses.asdict(load_config(path)), dataclasses.asdict(config)

    def compare(a: object, b: object, name: str) -> None:
        if name in may_change:
            return
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a:
                compare(a[key], b[key], f"{name}.{key}".lstrip("."))
        elif a != b:
            raise BadInput(
                f"{run} was trained with {name} {a!r}, not {b!r}: use that value, another --output, or --resume never"
            )

    compare(before, now, "")
    compare(before["train"]["seed"], now["train"]["seed"], "seed")


def set_aside(run: Path) -> None:
    """Move an earlier run in this folder to RUN/earlier-N: nothing is lost."""
    inside = [p for p in run.iterdir() if not p.name.startswith("earlier-")] if run.is_dir() else []
    if not inside:
        return
    target = run / f"earlier-{sum(1 for _ in run.glob('earlier-*')) + 1}"
    target.mkdir()
    for path in inside:
        shutil.move(path, target / path.name)
    log.warning("an earlier run was moved to %s", target)


def make_vocabulary(readers: list[ShardReader], config: Config) -> Vocabulary:
    """Words of the training split."""
    samples = itertools.islice(itertools.chain.from_iterable(readers), VOCABULARY_SAMPLES)
    texts = [text for sample in samples if isinstance(sample.texts, list) for text in sample.texts]
    return Vocabulary.build(texts, config.model.text.min_count, config.model.text.vocabulary_size)


@dataclass
class Networks:
    """Modules of a run and what trains them."""

    generator: Generator
    bare: dict[str, nn.Module]
    """The discriminators by name, without a wrapper."""
    engines: dict[str, Engine]
    """Of the generator and of each discriminator."""
    average: Generator | None
    """EMA of the generator."""

    @property
    def judged(self) -> Generator:
        """The generator that is validated and kept: the average where there is one."""
        return self.average or self.generator

    def parts(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by prefix."""
        parts: dict[str, nn.Module] = {"generator": self.generator, **self.bare}
        return parts if self.average is None else {**parts, "ema": self.average}

    def model_tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, module in self.parts().items():
            state = stored_tensors(module) if isinstance(module, Generator) else module.state_dict()
            out |= {f"{name}/{k}": v for k, v in state.items()}
        return out

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, optimisers too. Every process calls it: under ZeRO it gathers."""
        out = self.model_tensors()
        for name, engine in self.engines.items():
            out |= {f"optimizer/{name}/{k}": v for k, v in engine.state().items()}
        return out

    def set_rates(self, factor: float) -> None:
        """Learning rates times `factor`."""
        for engine in self.engines.values():
            engine.set_rate(factor)

    def release(self) -> None:
        """Let go of wrapped modules: none may outlive the process group."""
        for engine in self.engines.values():
            engine.release()

    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Raises BadInput when it is the checkpoint of another model."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        check_shapes(self.model_tensors(), {k: v for k, v in tensors.items() if not k.startswith("optimizer/")}, where)
        for name, module in self.parts().items():
            module.load_state_dict(under(f"{name}/"), strict=not isinstance(module, Generator))
        for name, engine in self.engines.items():
            engine.load(under(f"optimizer/{name}/"))


def build_networks(config: Config, spec: DataSpec, vocabulary: Vocabulary | None, parallel: Parallel) -> Networks:
    torch.manual_seed(config.train.seed)  # the same initial weights on every process
    generator = build_generator(config.model, spec, vocabulary)
    bare = dict(build_discriminators(config.model, generator.image_backbone.dim, generator.text_backbone.dim).items())
    if not config.loss.intra:  # parts that no loss reaches have no optimiser state either
        generator.image_decoder.requires_grad_(False)
        generator.text_decoder.requires_grad_(False)
    if not config.loss.classification:
        generator.classifiers.requires_grad_(False)
    average = copy.deepcopy(generator).requires_grad_(False).to(parallel.device) if config.train.ema else None
    if config.train.compile:
        for module in (generator, *bare.values()):
            module.compile()
    optim = config.optim
    if parallel.zero and (config.loss.r1 or config.loss.adversarial == "wgan-gp"):
        raise BadInput(
            "loss.r1 and loss.adversarial=wgan-gp take gradients of gradients, which DeepSpeed's engines get wrong: "
            "set loss.r1=0 and bce or hinge, or train without DeepSpeed"
        )

    def settings(lr: float, beta1: float, decay: float = 0.0) -> AdamSettings:
        return AdamSettings(lr, beta1, optim.beta2, decay, optim.clip, fp16=config.train.precision == "fp16")

    of_generator = settings(optim.generator_lr, optim.generator_beta1, optim.weight_decay)
    of_discriminators = settings(optim.discriminator_lr, optim.discriminator_beta1)
    sides: dict[str, nn.Module] | None = None
    if optim.update == "alternate":
        sides = {"image": OneSide(generator, "image"), "text": OneSide(generator, "text")}
    engines = {"generator": parallel.engine(generator, of_generator, sides)}
    engines |= {name: parallel.engine(bare[name], of_discriminators) for name in NAMES}
    return Networks(generator, bare, engines, average)


# ---------------------------------------------------------------------------------------------- one batch


def _rows(x: TextInput, first: int, stop: int) -> TextInput:
    if isinstance(x, Mapping):
        return {k: v[first:stop] for k, v in x.items()}
    return x[first:stop]


def make_scene(
    batch: Batch, networks: Networks, config: Config, parallel: Parallel, position: int, multi: bool
) -> Scene:
    """Run the no-grad forward that serves all discriminator phases, and choose the mismatched samples."""
    size, generator, engines = batch.size, networks.generator, networks.engines
    image_raw = batch.image.to(parallel.device, non_blocking=True)
    text_raw = generator.text_backbone.tokenise(batch.text, parallel.device)
    with torch.no_grad(), parallel.autocast():
        image, text = generator.extract(image_raw, text_raw)
        image_side, text_side = generator(image, text, classify=False, decode=config.loss.intra > 0)
    fake_image, fake_text = image_side.rows(0, size), text_side.rows(0, size)
    labels = batch.labels.to(parallel.device) if batch.labels is not None else None
    first, total = parallel.rank * size, parallel.world * size
    all_labels = None
    if labels is not None:
        labels = labels[:size]
        if config.loss.class_contrastive or (config.loss.inter and not batch.wrong_follow):
            all_labels = parallel.gather(labels.to(torch.uint8)).bool()
    return Scene(
        config=config,
        generator=engines["generator"].wrapped,
        discriminators={name: engines[name].wrapped[""] for name in networks.bare},
        bare=networks.bare,
        gather=parallel.gather_differentiable,
        first_row=first,
        total=total,
        multi=multi,
        image=image[:size],
        text=_rows(text, 0, size),
        labels=labels,
        all_labels=all_labels,
        fake_image=fake_image,
        fake_text=fake_text,
        wrong=_wrong(batch, image_side, text_side, labels, all_labels, first, total, config, parallel, position),
        position=position,
    )


def _wrong(
    batch: Batch,
    image: Side,
    text: Side,
    labels: Tensor | None,
    all_labels: Tensor | None,
    first: int,
    total: int,
    config: Config,
    parallel: Parallel,
    position: int,
) -> Wrong | None:
    """The mismatched rows: drawn by the stream when sampling is balanced, else picked from the global batch."""
    if not config.loss.inter:
        return None
    size = batch.size
    if batch.wrong_follow:
        rows = [side.rows(size, 2 * size) for side in (image, text)]
        return Wrong(rows[0].common, rows[1].common, rows[0].feature, rows[1].feature, None)
    index, mask = pick_wrong(labels, all_labels, first, size, total, config.train.seed, position)
    columns = [image.common, text.common]
    if config.loss.mismatch == "reference":
        columns += [image.feature, text.feature]
    joined = parallel.rows(torch.cat([c.float() for c in columns], 1), index)
    image_common, text_common, *features = joined.split([c.shape[1] for c in columns], 1)
    image_feature, text_feature = features or (image.feature, text.feature)
    if mask is not None:
        mask = mask.to(parallel.device)
    return Wrong(image_common, text_common, image_feature, text_feature, mask)


def update_average(average: Generator, generator: Generator, decay: float) -> None:
    """EMA of parameters and running statistics."""
    with torch.no_grad():
        now = stored_tensors(generator)
        for name, value in stored_tensors(average).items():
            if value.is_floating_point():
                value.lerp_(now[name], 1 - decay)


# ---------------------------------------------------------------------------------------------- the run


def score_of(metrics: Mapping[str, object]) -> float:
    """What validation maximises: MAP, mean of both directions; for pairs without labels the mean of R@1, 5 and 10."""
    keys = [k for k in metrics if k == "map/mean"] or [k for k in metrics if k.startswith("recall/")]
    values = [cast(float, metrics[k]) for k in keys]
    return sum(values) / len(values)


@dataclass
class Session:
    """A run that is ready to go on from `progress`."""

    config: Config
    run: Path
    stream: Stream
    val_reader: ShardReader
    parallel: Parallel
    networks: Networks
    recorder: Recorder
    checkpointer: Checkpointer
    progress: Progress
    multi: bool
    """Multi-label classes."""
    on_validation: Callable[[Session, dict[str, float]], None] | None = None
    """Called on every process after a validation and the checkpoint that is due with it; gets "score" and metrics."""
    bad: int = 0
    """Samples replaced on this process since the last log line."""
    skipped: dict[str, Tensor | float] = field(default_factory=dict)
    """fp16: steps left out since the start of this process, per phase."""

    @property
    def total(self) -> int:
        """Samples of the whole run."""
        return self.samples(self.config.train.epochs)

    def samples(self, epochs: float) -> int:
        """Epochs in samples, whole global batches."""
        batch = self.config.stream.global_batch
        return steps_for(epochs, self.stream.epoch_samples, batch) * batch

    def due(self, every: int, ahead: bool = False) -> bool:
        """Whether the batch that has just ended (`ahead`: that is under way) crosses a multiple of `every` samples."""
        batch = self.config.stream.global_batch
        position = self.progress.position + batch * ahead
        return position // every > (position - batch) // every


def prepare(config: Config, resume: str, may_change: Sequence[str] = MAY_CHANGE) -> Session:
    """Everything up to the first batch. Raises BadInput for whatever config, data or an earlier run make impossible.

    `may_change`: fields that may differ from the run that is resumed."""
    validate(config)
    run = Path(config.output)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    size = config.model.image.image_size
    micro = dataclasses.replace(config.stream, global_batch=micro_batch(config))
    stream = Stream(config.data, micro, seed=config.train.seed, image_size=size, rank=rank, world=world)
    val_reader = ShardReader(stream.readers[0].data, config.stream.val_split, config.stream)
    if resume == "auto":
        check_same_run(run, config, may_change)
    elif rank == 0:
        set_aside(run)

    tracker = config.train.tracker if rank == 0 else "none"
    parallel = Parallel(
        config.train.precision, tracker, str(run), config.train.timeout_s, config.train.reduce_precision
    )
    torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // parallel.local_world))
    spec = DataSpec.of(stream.manifest)
    vocabulary = make_vocabulary(stream.readers, config) if config.model.text.name == "cnn" else None
    networks = build_networks(config, spec, vocabulary, parallel)
    progress = Progress(epoch_samples=stream.epoch_samples)
    found: Path | None = None
    if resume == "auto":  # the first process looks, so that all take the same
        found = parallel.gather_objects(latest(run) if parallel.main else None)[0]
    if found is not None:
        progress, tensors = read_checkpoint(found)
        if progress.epoch_samples != stream.epoch_samples:
            raise BadInput(
                f"{run} was trained on epochs of {progress.epoch_samples} samples, {config.data} has "
                f"{stream.epoch_samples}: use the same data, another --output, or --resume never"
            )
        networks.load(tensors, str(found))
    if parallel.main:
        write_atomic(run / CONFIG_NAME, to_yaml(config))
        write_atomic(run / "best" / CONFIG_NAME, to_yaml(config))
        write_atomic(run / "best" / SPEC_NAME, json.dumps(dataclasses.asdict(spec), ensure_ascii=False) + "\n")
        if vocabulary is not None:
            vocabulary.save(run / "best" / VOCABULARY_NAME)
    parallel.start_trackers("tensorboard", {"preset": config.preset, "data": config.data})
    return Session(
        config=config,
        run=run,
        stream=stream,
        val_reader=val_reader,
        parallel=parallel,
        networks=networks,
        recorder=Recorder(run, main=parallel.main, track=parallel.track),
        checkpointer=Checkpointer(
            run, config.train.keep, rank=parallel.rank, world=parallel.world, group=parallel.new_group()
        ),
        progress=progress,
        multi=spec.label_kind == "multi",
    )


def train(config: Config, resume: str = "auto") -> int:
    """Train `config` to its end or to a signal; returns the exit code. `resume`: auto goes on from the newest
    checkpoint in config.output, never starts again and moves what is there aside.

    Raises BadInput before the first update for whatever the config, the data or an earlier run make impossible, and
    later when too many samples are bad or a loss is not finite."""
    return run_session(prepare(config, resume))


def run_session(session: Session) -> int:
    """Go on to the end or to a signal; returns the exit code.

    Raises BadInput, which may be this process's alone, and LostProcess when another one is gone or does not answer."""
    run, progress, total = session.run, session.progress, session.total
    parallel, recorder = session.parallel, session.recorder
    clock = Clock(parallel.device)
    with recorder.started(progress.position, total):
        if progress.position >= total:
            recorder.say(f"{run} is done: {total} samples, best validation score {progress.best:.4f}")
        else:
            if progress.position:
                recorder.say(f"resuming {run} at sample {progress.position} of {total}")
            processes = f"{parallel.world} process{'es' * (parallel.world > 1)}"
            each = micro_batch(session.config) // parallel.world
            parts = session.config.optim.accumulate
            how = f"{session.config.train.precision}{f', {parallel.kind}' * bool(parallel.kind)}"
            recorder.say(
                f"{processes} on {parallel.device.type} ({how}), {each * parts} samples a batch each"
                f"{f' in {parts} parts' * (parts > 1)}"
            )
            parallel.watch_signals()
            try:
                loop(session, clock)
                session.checkpointer.wait()
            except RuntimeError as error:
                if parallel.world == 1 or not is_lost_process(error):
                    raise
                raise LostProcess(
                    f"process {parallel.rank} lost another process at sample {progress.position} "
                    f"({str(error).splitlines()[0]}): start again to go on from the last checkpoint in {run}"
                ) from error
            if progress.position < total:
                where = f"sample {progress.position} of {total}"
                recorder.say(f"saved at {where} after a signal: start again to go on")
            elif parallel.main:
                clock.lap("other")
                clock.take()
                recorder.say(f"time: {clock.summary()}")
                done = f"done: {run}"
                if session.config.train.report:
                    from cmgan_dist.report import write_report  # it takes seconds to import, and only here

                    done = f"done: report at {write_report(run)}"
                recorder.say(done)
    session.networks.release()
    parallel.close()
    return EXIT_DONE if progress.position >= total else EXIT_SIGNALLED


def loop(session: Session, clock: Clock) -> None:
    """Batches up to the end of the run or a signal."""
    config = session.config
    table, parts = phase_table(config), config.optim.accumulate
    with (
        contextlib.closing(session.stream.batches(session.progress.position)) as source,
        tracing(session.run, session.parallel.rank, config.train.trace) as trace,
    ):
        while True:
            batches = list(itertools.islice(source, parts))
            clock.lap("data")
            if one_batch(session, batches, table, clock):
                return
            trace()


def one_batch(session: Session, batches: list[Batch], table: list[Phase], clock: Clock) -> bool:
    """One pass over the phase table, then what is due: log, validation, checkpoint. True when the run is to end."""
    config, parallel, networks = session.config, session.parallel, session.networks
    progress, recorder = session.progress, session.recorder
    batch_size, epoch_samples = config.stream.global_batch, progress.epoch_samples

    # --- reseed from the position, set the rates, run the table
    position, epoch = progress.position, progress.position / epoch_samples
    torch.manual_seed(mix(config.train.seed, position, parallel.rank, 8) >> 1)
    factor = rate(config.optim, epoch, config.train.epochs)
    networks.set_rates(factor)
    size = micro_batch(config)
    scenes = [
        make_scene(batch, networks, config, parallel, position + i * size, session.multi)
        for i, batch in enumerate(batches)
    ]
    clock.lap("no-grad forward")
    last = position + batch_size >= session.total
    log_now = last or session.due(config.train.log_every * batch_size, ahead=True)
    terms: dict[str, Tensor] = {}
    for phase in table:
        terms |= run_phase(phase, scenes, networks.engines, parallel.autocast, measure=log_now)
        clock.lap(phase.name)
    for key in {k for k in terms if k.startswith("skipped/")}:
        session.skipped[key] = session.skipped.get(key, 0) + terms.pop(key)
    if networks.average is not None:
        update_average(networks.average, networks.generator, config.train.ema)
    for line in (line for batch in batches for line in batch.bad):
        log.warning("bad sample replaced: %s", line)
        session.bad += 1

    # --- agree on what happened
    losses = {name: value for name, value in terms.items() if name.startswith("loss/")}
    wrong = not_finite(losses.values())
    stopped, diverged = parallel.any_process(wrong)
    if any(diverged):
        give_up(session, [name for name, flag in zip(losses, diverged, strict=True) if flag], wrong, batches)
    progress.position += batch_size

    # --- what is due now
    val_now = last or (config.train.val_every > 0 and session.due(session.samples(config.train.val_every)))
    save_now = last or stopped or session.due(session.samples(config.train.save_every))
    clock.lap("other")
    if log_now or save_now:
        stats = {k: sum(float(s.stats[k]) for s in scenes) / len(scenes) for k in scenes[0].stats}
        values = {"bad": float(session.bad), **{k: float(v) for k, v in terms.items()}, **stats}
        values = parallel.mean(values)
        progress.bad_samples += round(values.pop("bad") * parallel.world)
        session.bad = 0
    if log_now:
        values |= {"lr": config.optim.generator_lr * factor, "bad_samples": progress.bad_samples}
        values |= {k: float(v) for k, v in session.skipped.items()}
        values |= {"samples_per_s": recorder.rate(progress.position), **clock.take(), "memory_gib": parallel.memory()}
        recorder.line("train", progress.position, values, epoch_samples)
    recorder.show(progress.position, f"epoch {epoch:.0f} best {progress.best or 0:.4f}")
    scores = validate_now(session) if val_now else None
    clock.lap("validation")
    if save_now:
        session.checkpointer.save(progress, networks.tensors())
        clock.lap("checkpoint")
    if scores is not None and session.on_validation is not None:
        session.checkpointer.wait()
        session.on_validation(session, scores)
    return last or stopped


def give_up(session: Session, losses: list[str], wrong: Tensor, batches: list[Batch]) -> NoReturn:
    """Save the state, in which no update by a loss that is not finite has been made, and raise BadInput, the same on
    every process, naming phase, position and the samples of the processes that it came from."""
    parallel, progress = session.parallel, session.progress
    mine = [key for batch in batches for key in batch.keys[: batch.size]] if bool(wrong.any()) else []
    keys = [key for part in parallel.gather_objects(mine) for key in part]
    saved = session.checkpointer.path(progress.position)
    session.checkpointer.wait()
    if not saved.exists():
        session.checkpointer.save(progress, session.networks.tensors())
        session.checkpointer.wait()
    if parallel.main:
        record = {"losses": losses, "samples": progress.position, "keys": keys}
        write_atomic(session.run / "failure.json", json.dumps(record, indent=1) + "\n")
    step = progress.position // session.config.stream.global_batch
    raise BadInput(
        f"{losses[0]} is not finite in phase {losses[0].split('/')[1]} of step {step}, sample {progress.position} "
        f"(keys {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}, all in {session.run / 'failure.json'}): the state "
        f"before it is in {saved}; go on with a lower optim.generator_lr or optim.discriminator_lr",
        everywhere=True,
    )


def validate_now(session: Session) -> dict[str, float]:
    """Embed and score the validation split; keep the generator when it is the best so far. Returns "score" and the
    metrics, equal on every process."""
    config, progress, recorder = session.config, session.progress, session.recorder
    embedded = embed_split(session.networks.judged, session.val_reader, config, session.parallel)
    metrics = evaluate(embedded.common, zscore=config.eval.zscore, all_modal=False)
    score = score_of(metrics)
    if progress.best is None or score > progress.best:
        progress.best, progress.best_position = score, progress.position
        if session.parallel.main:
            save_best(session.run, stored_tensors(session.networks.judged), dataclasses.asdict(progress))
    values = {"score": score} | {k: v for k, v in metrics.items() if isinstance(v, float)}
    recorder.line("val", progress.position, values, progress.epoch_samples)
    epoch = progress.position / progress.epoch_samples
    recorder.say(f"epoch {epoch:6.1f}  validation {score:.4f}  best {progress.best:.4f}")
    return values
