"""The search space: what is refused, what is drawn, what is applied."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.config.fields import Config
from cmgan_dist.config.paths import get_value, settings, with_values
from cmgan_dist.config.presets import PRESETS, preset
from cmgan_dist.errors import BadInput
from tune.results import TrialResult, best_so_far, front, importance, position, ranked
from tune.space import SPACE, check_space, clip, domains, load_space, mutable, outside_of


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_space_fits_every_preset(name: str) -> None:
    assert check_space(SPACE, preset(name)) == SPACE


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"optim.generator_lrr": {"log": [1e-4, 1e-2]}}, "did you mean optim.generator_lr?"),
        ({"optim": {"log": [1e-4, 1e-2]}}, "is a section"),
        ({"optim.generator_lr": {"log": [1e-2, 1e-4]}}, "from 0.01 to 0.0001"),
        ({"optim.generator_lr": {"log": [0, 1e-2]}}, "low > 0 for log"),
        ({"optim.generator_lr": {"lg": [1e-4, 1e-2]}}, "one of log, uniform, int"),
        ({"optim.generator_lr": {"log": ["a", 1e-2]}}, "expected two numbers"),
        ({"optim.generator_lr": []}, "empty list"),
        ({"optim.generator_lr": ["fast"]}, "expected a value like 0.001"),
        ({"optim.generator_steps": {"uniform": [1, 3]}}, "whole number"),
        ({"model.dropout": {"uniform": [0, 1.5]}}, "model.dropout is 1.5"),
        ({"loss.adversarial": ["bce", "lsgan"]}, "expected one of bce, hinge, wgan-gp"),
        ({"train.epochs": [1.0, 2.0]}, "set by the search itself"),
        ({"data": ["a", "b"]}, "set by the search itself"),
        ({"optim.generator_lr": {"log": [1e-4, 10**400]}}, "expected two numbers"),
        ({"model.text.kernel_sizes": [[3], [0]]}, "model.text.kernel_sizes has 0, expected 1 to 1000"),
        ({"model.text.kernel_sizes": [[3], [3, 4]]}, None),
        ({"stream.global_batch": [63, 64], "stream.logical_streams": [1]}, None),
    ],
)
def test_bad_spaces_are_named(space: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        check_space(space, Config())
        return
    with pytest.raises(BadInput) as caught:
        check_space(space, Config())
    assert sentence in str(caught.value)
    assert next(iter(space)) in str(caught.value)


def test_a_space_file_replaces_the_default(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("optim.generator_lr: {log: [1e-4, 1e-2]}\noptim.generator_steps: {int: [1, 3]}\n")
    space = check_space(load_space(str(file)), Config())  # YAML reads 1e-4 as a string
    assert space == {"optim.generator_lr": {"log": [1e-4, 1e-2]}, "optim.generator_steps": {"int": [1, 3]}}
    file.write_text("- 1\n")
    with pytest.raises(BadInput, match="not a mapping"):
        load_space(str(file))
    file.write_text("a: {b\n")
    with pytest.raises(BadInput, match="not YAML"):
        load_space(str(file))
    with pytest.raises(BadInput, match="does not exist"):
        load_space(str(tmp_path / "none.yaml"))
    with pytest.raises(BadInput, match="is a folder"):
        load_space(str(tmp_path))
    file.write_text("1: [2, 3]\n")
    with pytest.raises(BadInput, match="the search space: 1 is no config field"):
        check_space(load_space(str(file)), Config())


def test_draws_lie_in_their_ranges_and_reach_both_ends() -> None:
    drawn = {path: [domain.sample() for _ in range(400)] for path, domain in domains(SPACE).items()}
    for path, values in drawn.items():
        assert not any(outside_of(SPACE, {p: v[i] for p, v in drawn.items()}) for i in range(400))
        places = [position(SPACE[path], v) for v in values]
        assert min(places) < 0.1
        assert max(places) > 0.9
    assert set(drawn["optim.generator_steps"]) == {1, 2, 3}
    # even on a logarithmic scale: half of the draws lie below the geometric mean of the ends
    low, high = SPACE["optim.generator_lr"]["log"]
    below = sum(v < math.sqrt(low * high) for v in drawn["optim.generator_lr"])
    assert 150 < below < 250


def test_values_are_applied_to_a_copy() -> None:
    base = preset("features")
    changed = with_values(base, {"loss.inter": 2.5, "model.text.max_tokens": 3})
    assert (changed.loss.inter, changed.model.text.max_tokens) == (2.5, 3)
    assert (base.loss.inter, base.model.text.max_tokens) == (0.0, 64)
    assert get_value(changed, "model.text.max_tokens") == 3


def test_what_pbt_multiplied_is_moved_back_into_its_range() -> None:
    values = {path: get_value(preset("features"), path) for path in SPACE}
    values |= {"model.dropout": 0.9, "optim.generator_steps": 2.4, "loss.contrastive": 1e-9}
    clipped = clip(SPACE, values)
    assert (clipped["model.dropout"], clipped["optim.generator_steps"], clipped["loss.contrastive"]) == (0.7, 2, 0.03)
    assert not outside_of(SPACE, clipped)
    assert {k: v for k, v in clipped.items() if v != values[k]}.keys() == {
        "model.dropout",
        "optim.generator_steps",
        "loss.contrastive",
    }


def test_only_what_has_no_shape_or_state_is_mutable() -> None:
    assert mutable("loss.inter")
    assert mutable("optim.generator_lr")
    for path in ("optim.weight_decay", "optim.generator_beta1", "model.common_dim", "stream.global_batch"):
        assert not mutable(path)
    expected = {path for path in settings() if path.startswith("loss.")}
    expected |= {"optim.generator_lr", "optim.discriminator_lr", "optim.generator_steps"}
    expected |= {"model.dropout", "model.input_dropout"}
    assert {path for path in settings() if mutable(path)} == expected


def trial(name: str, values: dict[str, Any], curve: list[tuple[float, float]], **more: Any) -> TrialResult:
    return TrialResult(name, values, "ended", best=max(s for _, s in curve), curve=curve, **more)


def test_importance_finds_the_value_that_the_score_was_made_of() -> None:
    space = {
        "optim.generator_lr": {"log": [1e-4, 1e-2]},
        "loss.inter": {"log": [0.01, 1]},
        "loss.adversarial": ["a", "b"],
    }
    draws = {path: domains(space)[path] for path in space}
    trials = []
    for i in range(60):
        values = {path: draw.sample() for path, draw in draws.items()}
        score = 1 - (position(space["optim.generator_lr"], values["optim.generator_lr"]) - 0.3) ** 2
        # later scores are made of something else: trials are compared where all of them were
        later = [(2.0, values["loss.inter"])] if i % 2 else []
        trials.append(trial(str(i), values, [(1.0, score), *later]))
    found = importance(trials, space)
    assert found is not None
    assert found.epoch == 1.0
    assert next(iter(found.shares)) == "optim.generator_lr"
    assert found.shares["optim.generator_lr"] > 0.8
    assert max(found.shares["loss.inter"], found.shares["loss.adversarial"]) < 0.1
    assert found.r2 > 0.7
    assert importance(trials[:9], space) is None


def test_the_front_holds_what_no_other_trial_beats_in_both_directions() -> None:
    places = {"a": (0.5, 0.1), "b": (0.4, 0.4), "c": (0.4, 0.3), "d": (0.1, 0.5), "e": (0.5, 0.1)}
    trials = [trial(name, {}, [(1, 0.2)], image_to_text=i, text_to_image=t) for name, (i, t) in places.items()]
    assert front(trials) == {"a", "b", "d", "e"}


def test_ranking_leaves_out_what_failed() -> None:
    trials = [
        trial("a", {}, [(1, 0.3), (2, 0.2)]),
        trial("b", {}, [(1, 0.4)]),
        TrialResult("c", {}, "failed", failed="x"),
    ]
    assert [r.name for r in ranked(trials)] == ["b", "a"]
    assert best_so_far(trials[0].curve, 2) == 0.3
    assert best_so_far(trials[1].curve, 2) is None
