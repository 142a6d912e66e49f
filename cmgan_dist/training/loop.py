"""What happens in a run from its first batch to its last: phases over each batch, log, validation, checkpoints.

Everything random is seeded from (seed, position, rank), and a checkpoint holds the rest of the state: a run that was
killed and resumed ends bitwise like one that was not (on the same kind of CPU, with the same processes and threads).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
from typing import NoReturn

import torch
from torch import Tensor

from cmgan_dist.config.fields import Config, micro_batch
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.handover import is_lost_worker, lost_worker
from cmgan_dist.data.order import mix
from cmgan_dist.distributed.join import is_lost_process, reason_of
from cmgan_dist.distributed.shard import load_tensors, whole_tensors
from cmgan_dist.errors import EXIT_DONE, BadInput, LostProcess
from cmgan_dist.files import write_atomic
from cmgan_dist.interrupts import EXIT_SIGNALLED
from cmgan_dist.models.saved import BEST, read_model, save_model, stored_tensors
from cmgan_dist.retrieval.embed import embed_sample, embed_split
from cmgan_dist.training.choose_scoring import SAMPLES, asked_of, choose_scoring, validation_of
from cmgan_dist.training.phases import Phase, not_finite, phase_table, run_phase
from cmgan_dist.training.recorder import Clock, tracing
from cmgan_dist.training.run import Run, prepare
from cmgan_dist.training.schedule import rate
from cmgan_dist.training.state import update_average
from cmgan_dist.training.step import StepInputs, build_step_inputs

log = logging.getLogger(__name__)
FP16_ROOM = 2.0**12
"""A layer's sums over features beyond this may leave the range of fp16, which ends at 65,504."""
HUGE = 1e18
"""The square of a larger feature leaves the range of fp32."""


def train(config: Config, resume: str = "auto") -> int:
    """Train `config` to its end or to a signal, and return the exit code.

    `resume`: auto goes on from the newest checkpoint in config.output, never starts again and moves what is there
    aside. Raises BadInput before the first update for whatever the config, the data or an earlier run make impossible,
    and later when too many samples are bad or a loss is not finite."""
    return run_training(prepare(config, resume))


def run_training(run: Run) -> int:
    """Go on with `run` to its end or to a signal, and return the exit code (EXIT_DONE or EXIT_SIGNALLED).

    Raises BadInput, which may be this process's alone, and LostProcess when another one is gone or does not answer."""
    with run.held:
        return _run_training(run)


def _run_training(run: Run) -> int:
    progress, total = run.progress, run.total
    parallel, recorder = run.parallel, run.recorder
    clock = Clock(parallel.device)
    with recorder.started(progress.position, total):
        done = progress.position >= total
        if done and progress.best is None:  # its best model is gone
            validate_now(run)
        if done:
            recorder.say(f"{run.folder} is done: {total} samples, best validation score {progress.best:.4f}")
        else:
            if progress.position:
                recorder.say(f"resuming {run.folder} at sample {progress.position} of {total}")
            recorder.say(how_it_trains(run))
        try:
            if not done:
                parallel.watch_signals()
                loop(run, clock)
                run.checkpointer.wait()
            if progress.position >= total:
                keep_scoring(run)
        except RuntimeError as error:
            if is_lost_worker(error):
                raise lost_worker(error) from None
            if parallel.world == 1 or not is_lost_process(error):
                raise
            raise LostProcess(
                f"process {parallel.rank} lost another process at sample {progress.position} "
                f"({reason_of(error)}): start again to go on from the last checkpoint in {run.folder}"
            ) from error
        if progress.position < total:
            recorder.say(f"saved at sample {progress.position} of {total} after a signal: start again to go on")
        elif not done:
            clock.lap("other")
            clock.take()
            recorder.say(f"time: {clock.summary()}")
            recorder.say(f"done: {run.folder}")
    run.networks.release()
    parallel.close()
    return EXIT_DONE if progress.position >= total else EXIT_SIGNALLED


def how_it_trains(run: Run) -> str:
    """Return in words how many processes train, on what, in which precision, and their part of each batch."""
    parallel, parts = run.parallel, run.config.optim.accumulate
    processes = f"{parallel.world} process{'es' * (parallel.world > 1)}"
    each = micro_batch(run.config) // parallel.world
    how = f"{run.config.train.precision}{f', {parallel.kind}' * bool(parallel.kind)}"
    return (
        f"{processes} on {parallel.device.type} ({how}), {each * parts} samples a batch each"
        f"{f' in {parts} parts' * (parts > 1)}"
    )


def loop(run: Run, clock: Clock) -> None:
    """Train on batch after batch up to the end of the run or a signal."""
    config = run.config
    table, parts = phase_table(config), config.optim.accumulate
    with (
        contextlib.closing(run.stream.batches(run.progress.position)) as source,
        tracing(run.folder, run.parallel.rank, config.train.trace) as trace,
    ):
        while True:
            batches = list(itertools.islice(source, parts))
            clock.lap("data")
            if one_batch(run, batches, table, clock):
                return
            trace()


def one_batch(run: Run, batches: list[Batch], table: list[Phase], clock: Clock) -> bool:
    """Run the phase table over one batch, then what is due: log, validation, checkpoint.

    `batches`: the micro-batches of one global batch. Return whether the run is to end."""
    config, progress = run.config, run.progress
    last = progress.position + config.stream.global_batch >= run.total
    log_now = last or run.due(config.train.log_every * config.stream.global_batch, ahead=True)
    run.networks.keep_buffers()
    micro_batches, terms = run_phases(run, batches, table, clock, measure=log_now)
    for line in (line for batch in batches for line in batch.bad):
        log.warning("bad sample replaced: %s", line)
        run.bad += 1

    # --- agree on what happened
    losses = {name: value for name, value in terms.items() if name.startswith("loss/")}
    bad_losses = not_finite(losses.values())
    stopped, diverged = run.parallel.any_process(bad_losses)
    if any(diverged):
        give_up(run, [name for name, flag in zip(losses, diverged, strict=True) if flag], bad_losses, batches)
    progress.position += config.stream.global_batch

    # --- what is due now
    val_now = last or (config.train.val_every > 0 and run.due(run.samples(config.train.val_every)))
    save_now = last or stopped or run.due(run.samples(config.train.save_every))
    clock.lap("other")
    if log_now or save_now:
        record_batch(run, micro_batches, terms, clock if log_now else None)
    run.recorder.show(progress.position, f"epoch {run.epoch:.0f} best {progress.best or 0:.4f}")
    scores = validate_now(run) if val_now else None
    clock.lap("validation")
    if save_now:
        run.checkpointer.save(progress, run.networks.tensors())
        clock.lap("checkpoint")
    if scores is not None and run.on_validation is not None:
        run.checkpointer.wait()
        run.on_validation(run, scores)
    return last or stopped


def run_phases(
    run: Run, batches: list[Batch], table: list[Phase], clock: Clock, measure: bool
) -> tuple[list[StepInputs], dict[str, Tensor]]:
    """Reseed from the position, set the learning rates and run the phase table.

    Return the inputs of each micro-batch, in which the losses have left their statistics, and what `run_phase` returned
    for all phases."""
    config, parallel, networks, position = run.config, run.parallel, run.networks, run.progress.position
    torch.manual_seed(mix(config.train.seed, position, parallel.rank, 8) >> 1)
    networks.set_rates(rate(config.optim, run.epoch, config.train.epochs))
    size = micro_batch(config)
    micro_batches = [
        build_step_inputs(batch, networks, config, parallel, position + i * size) for i, batch in enumerate(batches)
    ]
    clock.lap("no-grad forward")
    terms: dict[str, Tensor] = {}
    for phase in table:
        terms |= run_phase(phase, micro_batches, networks.engines, parallel.autocast, measure)
        clock.lap(phase.name)
    for key in {k for k in terms if k.startswith("skipped/")}:
        run.skipped[key] = run.skipped.get(key, 0) + terms.pop(key)
    if networks.average is not None:
        update_average(networks.average, networks.generator, config.train.ema)
    return micro_batches, terms


def record_batch(run: Run, micro_batches: list[StepInputs], terms: dict[str, Tensor], clock: Clock | None) -> None:
    """Average over the processes what the batch that has just ended measured, and count bad samples and skipped steps.

    With a `clock`, write a line of metrics.jsonl. Every process calls it."""
    progress, parallel = run.progress, run.parallel
    names, parts = micro_batches[0].stats, len(micro_batches)
    stats = {k: sum(float(inputs.stats[k]) for inputs in micro_batches) / parts for k in names}
    values = parallel.mean({"bad": float(run.bad), **{k: float(v) for k, v in terms.items()}, **stats})
    progress.bad_samples += round(values.pop("bad") * parallel.world)
    counts = {k: progress.skipped.get(k, 0) + round(float(v)) for k, v in run.skipped.items()}
    progress.skipped = progress.skipped | counts
    run.bad, run.skipped = 0, {}
    if clock is None:
        return
    began = (progress.position - run.config.stream.global_batch) / progress.epoch_samples
    factor = rate(run.config.optim, began, run.config.train.epochs)
    values |= {"lr": run.config.optim.generator_lr * factor, "bad_samples": progress.bad_samples}
    values |= {k: float(v) for k, v in progress.skipped.items()}
    values |= {"samples_per_s": run.recorder.rate(progress.position), **clock.take(), "memory_gib": parallel.memory()}
    run.recorder.line("train", progress.position, values, progress.epoch_samples)


def give_up(run: Run, losses: list[str], bad_losses: Tensor, batches: list[Batch]) -> NoReturn:
    """Save the state, and raise BadInput that names the phase, the position and the samples of losses not finite.

    In that state no update by such a loss has been made, nor is its batch in running statistics. `losses`: their names,
    on any process. `bad_losses`: bool, which losses of this process they are; the samples named are those of the
    processes that have one. The error is the same on every process."""
    parallel, progress = run.parallel, run.progress
    mine = [key for batch in batches for key in batch.keys[: batch.size]] if bool(bad_losses.any()) else []
    keys = [key for part in parallel.gather_objects(mine) for key in part]
    run.networks.restore_buffers()
    largest = max(parallel.gather_objects(max(map(largest_feature, batches))))
    saved = run.checkpointer.path(progress.position)
    run.checkpointer.wait()
    if run.checkpointer.newest != progress.position:
        run.checkpointer.save(progress, run.networks.tensors())
        run.checkpointer.wait()
    if parallel.main:
        record = {"losses": losses, "samples": progress.position, "keys": keys}
        write_atomic(run.folder / "failure.json", json.dumps(record, indent=1) + "\n")
    step = progress.position // run.config.stream.global_batch
    raise BadInput(
        f"{losses[0]} is not finite in phase {losses[0].split('/')[1]} of step {step}, sample {progress.position} "
        f"(keys {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}, all in {run.folder / 'failure.json'}): the state "
        f"before it is in {saved}; {advice_for(largest, run.config.train.precision)}",
        everywhere=True,
    )


def largest_feature(batch: Batch) -> float:
    """Return the largest size of a number among a batch's precomputed features, inf for NaN, 0 without features."""
    features = [x for x in (batch.image, batch.text) if isinstance(x, Tensor) and x.is_floating_point()]
    return max((float(x.abs().nan_to_num(math.inf).max()) for x in features), default=0.0)


def advice_for(largest: float, precision: str) -> str:
    """Return what to do about a loss that is not finite, in words; `largest`: see `largest_feature`."""
    if largest > HUGE:
        return f"features of those samples are as large as {largest:.0e}: mend them and begin anew by --resume never"
    if precision == "fp16" and largest > FP16_ROOM:
        return f"features as large as {largest:.0f} leave the range of fp16: go on with train.precision=bf16 or fp32"
    return (
        "go on with a lower optim.generator_lr or optim.discriminator_lr, and where that ends here too, the state is "
        "spoilt already: begin anew with it by --resume never"
    )


def keep_scoring(run: Run) -> None:
    """Choose how the best model of a run that has ended compares items, and keep that with it; nothing is done where it
    was chosen by the same settings before. Every process calls it, the first one chooses; the generator that is
    evaluated has the best model's weights afterwards."""
    saved, config = read_model(run.folder), run.config
    if saved.scoring.spec.asked == asked_of(config.eval, bool(run.spec.data.classes)):
        return
    generator = run.networks.eval_generator
    load_tensors(generator, saved.tensors, strict=False)
    train = embed_sample(generator, run.stream.readers, SAMPLES, config, run.parallel)
    val = embed_split(generator, run.val_reader, config, run.parallel)

    def choose() -> None:
        multi_label, seed = run.networks.multi_label, config.train.seed
        save_model(
            run.folder / BEST,
            run.spec,
            dataclasses.replace(saved.config, eval=config.eval),
            saved.tensors,
            progress=saved.spec.progress,
            vocabulary=run.vocabulary,
            scoring=choose_scoring(train, val, config.eval, multi_label, seed, run.recorder.say),
        )

    run.parallel.on_main(choose)  # the others wait, so that none takes the model for unfinished


def validate_now(run: Run) -> dict[str, float]:
    """Embed and score the validation split, and keep the generator as `train.select` says.

    Return "score" and the metrics by name, equal on every process."""
    config, progress, recorder = run.config, run.progress, run.recorder
    embedded = embed_split(run.networks.eval_generator, run.val_reader, config, run.parallel)
    score, metrics = validation_of(embedded, config.eval, run.networks.multi_label, run.parallel)
    if progress.best is None or score > progress.best or config.train.select == "last":
        progress.best, progress.best_position = score, progress.position
        held = stored_tensors(run.networks.eval_generator)
        tensors = dict(whole_tensors(held, held if run.parallel.main else ()))
        if run.parallel.main:
            save_model(
                run.folder / BEST,
                run.spec,
                run.config,
                tensors,
                progress=dataclasses.asdict(progress),
                vocabulary=run.vocabulary,
            )
    values = {"score": score} | {k: v for k, v in metrics.items() if isinstance(v, float)}
    recorder.line("val", progress.position, values, progress.epoch_samples)
    recorder.say(f"epoch {run.epoch:6.1f}  validation {score:.4f}  best {progress.best:.4f}")
    return values
