"""The training loop: batches in, phases over them, validation, checkpoints.

Everything random is seeded from (seed, position, rank), and a checkpoint holds the rest of the state: a run that was
killed and resumed ends bitwise like one that was not (on the same kind of CPU, with the same processes and threads).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cmgan_dist.backbones import TextInput
from cmgan_dist.checkpoint import Checkpoint, Progress, check_shapes, load_latest, save_best, save_checkpoint
from cmgan_dist.config import CONFIG_NAME, Config, OptimConfig, to_yaml, validate
from cmgan_dist.discriminators import NAMES, build_discriminators
from cmgan_dist.embed import SPEC_NAME, VOCABULARY_NAME, embed_split
from cmgan_dist.errors import EXIT_DONE, EXIT_SIGNALLED, BadInput
from cmgan_dist.metrics import evaluate
from cmgan_dist.networks import DataSpec, Generator, Side, build_generator, stored_tensors
from cmgan_dist.order import mix, steps_for
from cmgan_dist.parallel import Parallel
from cmgan_dist.phases import Scene, Wrong, phase_table, pick_wrong, run_phase
from cmgan_dist.presets import load_config
from cmgan_dist.record import Recorder
from cmgan_dist.report import write_report
from cmgan_dist.schema import write_atomic
from cmgan_dist.stream import Batch, ShardReader, Stream
from cmgan_dist.vocabulary import Vocabulary

log = logging.getLogger(__name__)

MAY_CHANGE = (
    *("train", "eval", "data", "output", "preset", "stream.workers", "stream.max_bad_share"),
    *("stream.cache", "stream.cache_gib", "stream.retries", "stream.timeout_s"),
)
"""What a resumed run may change; train.seed may not."""
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
    """Modules and optimisers of a run."""

    generator: Generator
    wrapped: nn.Module
    bare: dict[str, nn.Module]
    discriminators: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    average: Generator | None
    """EMA of the generator."""

    @property
    def judged(self) -> Generator:
        """The generator that is validated and kept: the average where there is one."""
        return self.average or self.generator

    def tensors(self) -> dict[str, Tensor]:
        out = {f"generator/{k}": v for k, v in stored_tensors(self.generator).items()}
        for name, module in self.bare.items():
            out |= {f"{name}/{k}": v for k, v in module.state_dict().items()}
        if self.average is not None:
            out |= {f"ema/{k}": v for k, v in stored_tensors(self.average).items()}
        return out

    def set_rates(self, factor: float, config: OptimConfig) -> None:
        """Learning rates times `factor`."""
        for name, optimizer in self.optimizers.items():
            base = config.generator_lr if name == "generator" else config.discriminator_lr
            optimizer.param_groups[0]["lr"] = base * factor

    def unwrap(self) -> None:
        """Let go of the DDP modules: none may outlive the process group."""
        self.discriminators.clear()
        self.wrapped = self.generator

    def load(self, checkpoint: Checkpoint, where: str) -> None:
        """Raises BadInput when it is the checkpoint of another model."""
        check_shapes(self.tensors(), checkpoint.tensors, where)
        parts: dict[str, nn.Module] = {"generator": self.generator, **self.bare}
        if self.average is not None:
            parts["ema"] = self.average
        for name, module in parts.items():
            state = {k.removeprefix(f"{name}/"): v for k, v in checkpoint.tensors.items() if k.startswith(f"{name}/")}
            module.load_state_dict(state, strict=name not in ("generator", "ema"))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(checkpoint.optimizers[name])


def build_networks(config: Config, spec: DataSpec, vocabulary: Vocabulary | None, parallel: Parallel) -> Networks:
    torch.manual_seed(config.train.seed)  # the same initial weights on every process
    generator = build_generator(config.model, spec, vocabulary)
    bare = dict(build_discriminators(config.model, generator.image_backbone.dim, generator.text_backbone.dim).items())
    wrapped = parallel.wrap(generator)
    discriminators = {name: parallel.wrap(module) for name, module in bare.items()}
    optim = config.optim

    def adam(module: nn.Module, lr: float, beta1: float, decay: float = 0.0) -> torch.optim.Optimizer:
        parameters = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=lr, betas=(beta1, optim.beta2), weight_decay=decay, fused=True)

    optimizers = {"generator": adam(generator, optim.generator_lr, optim.generator_beta1, optim.weight_decay)}
    optimizers |= {n: adam(bare[n], optim.discriminator_lr, optim.discriminator_beta1) for n in NAMES}
    average = None
    if config.train.ema:
        average = copy.deepcopy(generator).requires_grad_(False)
    return Networks(generator, wrapped, bare, discriminators, optimizers, average)


# ---------------------------------------------------------------------------------------------- one batch


def _rows(x: TextInput, first: int, stop: int) -> TextInput:
    if isinstance(x, Mapping):
        return {k: v[first:stop] for k, v in x.items()}
    return x[first:stop]


def make_scene(
    batch: Batch, networks: Networks, config: Config, parallel: Parallel, position: int, multi: bool
) -> Scene:
    """Run the no-grad forward that serves all discriminator phases, and choose the mismatched samples."""
    size, generator = batch.size, networks.generator
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
        all_labels = parallel.gather(labels[:size].to(torch.uint8)).bool()
        labels = labels[:size]
    return Scene(
        config=config,
        generator=networks.wrapped,
        discriminators=networks.discriminators,
        bare=networks.bare,
        gather=parallel.gather_differentiable,
        first_row=first,
        multi=multi,
        image=image[:size],
        text=_rows(text, 0, size),
        labels=labels,
        all_labels=all_labels,
        fake_image=fake_image,
        fake_text=fake_text,
        wrong=_wrong(image_side, text_side, labels, all_labels, size, first, total, config, parallel, position),
        position=position,
        stats={},
    )


def _wrong(
    image: Side,
    text: Side,
    labels: Tensor | None,
    all_labels: Tensor | None,
    size: int,
    first: int,
    total: int,
    config: Config,
    parallel: Parallel,
    position: int,
) -> Wrong | None:
    """The mismatched rows: drawn by the stream when sampling is balanced, else picked from the global batch."""
    if not config.loss.inter:
        return None
    if len(image.common) > size:
        rows = [side.rows(size, 2 * size) for side in (image, text)]
        return Wrong(rows[0].common, rows[1].common, rows[0].feature, rows[1].feature, None)
    index, mask = pick_wrong(labels, all_labels, first, size, total, config.train.seed, position)
    columns = [image.common, text.common]
    if config.loss.mismatch == "reference":
        columns += [image.feature, text.feature]
    joined = parallel.gather(torch.cat([c.float() for c in columns], 1))[index.to(parallel.device)]
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
    progress: Progress
    multi: bool
    """Multi-label classes."""
    on_validation: Callable[[Session, dict[str, float]], None] | None = None
    """Called on every process after a validation and the checkpoint that is due with it; gets "score" and metrics."""
    report: bool = True
    """Write RUN/report.html at the end."""

    @property
    def total(self) -> int:
        """Samples of the whole run."""
        return self.samples(self.config.train.epochs)

    def samples(self, epochs: float) -> int:
        """Epochs in samples, whole global batches."""
        batch = self.config.stream.global_batch
        return steps_for(epochs, self.stream.epoch_samples, batch) * batch

    def due(self, every: int) -> bool:
        """Whether the batch that has just ended crossed a multiple of `every` samples."""
        position = self.progress.position
        return position // every > (position - self.config.stream.global_batch) // every


def prepare(config: Config, resume: str, may_change: Sequence[str] = MAY_CHANGE) -> Session:
    """Everything up to the first batch. Raises BadInput for whatever config, data or an earlier run make impossible.

    `may_change`: fields that may differ from the run that is resumed."""
    validate(config)
    run = Path(config.output)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    size = config.model.image.image_size
    stream = Stream(config.data, config.stream, seed=config.train.seed, image_size=size, rank=rank, world=world)
    val_reader = ShardReader(stream.readers[0].data, config.stream.val_split, config.stream)
    if resume == "auto":
        check_same_run(run, config, may_change)
    elif rank == 0:
        set_aside(run)

    parallel = Parallel(config.train.precision, config.train.tracker if rank == 0 else "none", str(run))
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // parallel.local_world))
    spec = DataSpec.of(stream.manifest)
    vocabulary = make_vocabulary(stream.readers, config) if config.model.text.name == "cnn" else None
    networks = build_networks(config, spec, vocabulary, parallel)
    progress = Progress(epoch_samples=stream.epoch_samples)
    checkpoint = load_latest(run) if resume == "auto" else None
    if checkpoint is not None:
        if checkpoint.progress.epoch_samples != progress.epoch_samples:
            raise BadInput(
                f"{run} was trained on epochs of {checkpoint.progress.epoch_samples} samples, {config.data} has "
                f"{progress.epoch_samples}: use the same data, another --output, or --resume never"
            )
        networks.load(checkpoint, f"{run}/checkpoints")
        progress = checkpoint.progress
    if parallel.main:
        write_atomic(run / CONFIG_NAME, to_yaml(config))
        write_atomic(run / "best" / CONFIG_NAME, to_yaml(config))
        write_atomic(run / "best" / SPEC_NAME, json.dumps(dataclasses.asdict(spec), ensure_ascii=False) + "\n")
        if vocabulary is not None:
            vocabulary.save(run / "best" / VOCABULARY_NAME)
    parallel.start_trackers("tensorboard", {"preset": config.preset, "data": config.data})
    recorder = Recorder(run, main=parallel.main, track=parallel.track)
    return Session(config, run, stream, val_reader, parallel, networks, recorder, progress, spec.label_kind == "multi")


def train(config: Config, resume: str = "auto") -> int:
    """Train `config` to its end or to a signal; returns the exit code. `resume`: auto goes on from the newest
    checkpoint in config.output, never starts again and moves what is there aside.

    Raises BadInput before the first update for whatever the config, the data or an earlier run make impossible, and
    later when too many samples are bad or a loss is not finite."""
    return run_session(prepare(config, resume))


def run_session(session: Session) -> int:
    """Go on to the end or to a signal; returns the exit code. Raises BadInput, which may be this process's alone."""
    run, progress, total = session.run, session.progress, session.total
    with session.recorder.started(progress.position, total):
        if progress.position >= total:
            session.recorder.say(f"{run} is done: {total} samples, best validation score {progress.best:.4f}")
        else:
            if progress.position:
                session.recorder.say(f"resuming {run} at sample {progress.position} of {total}")
            batch, world = session.config.stream.global_batch, session.parallel.world
            processes = f"{world} process{'es' if world > 1 else ''}"
            session.recorder.say(
                f"{processes} on {session.parallel.device.type}, {batch // world} samples a batch each"
            )
            session.parallel.watch_signals()
            loop(session)
            if progress.position < total:
                where = f"sample {progress.position} of {total}"
                session.recorder.say(f"saved at {where} after a signal: start again to go on")
            elif session.parallel.main and session.report:
                session.recorder.say(f"done: report at {write_report(run)}")
    session.networks.unwrap()
    session.parallel.close()
    return EXIT_DONE if progress.position >= total else EXIT_SIGNALLED


def loop(session: Session) -> None:
    """Batches up to the end of the run or a signal."""
    config, parallel, networks = session.config, session.parallel, session.networks
    progress, recorder, total = session.progress, session.recorder, session.total
    batch_size, epoch_samples = config.stream.global_batch, progress.epoch_samples
    table = phase_table(config)
    bad = 0
    for batch in session.stream.batches(progress.position):
        # --- one batch: reseed from the position, set the rates, run the table
        position, epoch = progress.position, progress.position / epoch_samples
        torch.manual_seed(mix(config.train.seed, position, parallel.rank, 8) >> 1)
        factor = rate(config.optim, epoch, config.train.epochs)
        networks.set_rates(factor, config.optim)
        scene = make_scene(batch, networks, config, parallel, position, session.multi)
        terms: dict[str, Tensor] = {}
        for phase in table:
            terms |= run_phase(phase, scene, networks.optimizers, parallel.autocast, config.optim.clip)
        if networks.average is not None:
            update_average(networks.average, networks.generator, config.train.ema)
        progress.position += batch_size
        for line in batch.bad:
            log.warning("bad sample replaced: %s", line)
        bad += len(batch.bad)

        # --- what is due now
        last, stopped = progress.position >= total, parallel.stop_requested()
        log_now = last or session.due(config.train.log_every * batch_size)
        val_now = last or (config.train.val_every > 0 and session.due(session.samples(config.train.val_every)))
        save_now = last or stopped or session.due(session.samples(config.train.save_every))
        if log_now or save_now:
            values = parallel.mean({"bad": bad, **{k: float(v) for k, v in {**terms, **scene.stats}.items()}})
            progress.bad_samples += round(values.pop("bad") * parallel.world)
            bad = 0
        if log_now:
            check_finite(values, position)
            values |= {"lr": config.optim.generator_lr * factor, "bad_samples": progress.bad_samples}
            recorder.line(
                "train", progress.position, values | {"samples_per_s": recorder.rate(progress.position)}, epoch_samples
            )
        recorder.show(progress.position, f"epoch {epoch:.0f} best {progress.best or 0:.4f}")
        scores = validate_now(session) if val_now else None
        if save_now:
            if parallel.main:
                states = {k: o.state_dict() for k, o in networks.optimizers.items()}
                save_checkpoint(session.run, Checkpoint(progress, networks.tensors(), states), config.train.keep)
            parallel.barrier()
        if scores is not None and session.on_validation is not None:
            session.on_validation(session, scores)
        if last or stopped:
            return


def check_finite(values: dict[str, float], position: int) -> None:
    """Raises BadInput naming the first loss that is NaN or Inf."""
    for name, value in values.items():
        if name.startswith("loss/") and not math.isfinite(value):
            raise BadInput(
                f"{name} is {value} at sample {position}: the run has diverged, lower optim.generator_lr or "
                "optim.discriminator_lr and start from the last checkpoint"
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
            save_best(session.run, stored_tensors(session.networks.judged), progress)
    values = {"score": score} | {k: v for k, v in metrics.items() if isinstance(v, float)}
    recorder.line("val", progress.position, values, progress.epoch_samples)
    epoch = progress.position / progress.epoch_samples
    recorder.say(f"epoch {epoch:6.1f}  validation {score:.4f}  best {progress.best:.4f}")
    return values
