"""What validation chooses reaches most and is kept with the model; it is chosen anew where something else is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cmgan_dist
from cmgan_dist.config.fields import EvalConfig
from cmgan_dist.models.saved import read_model
from cmgan_dist.models.scoring import Scoring, Shares
from cmgan_dist.retrieval.embed import Embedded, Made
from cmgan_dist.retrieval.evaluate import open_task, run_task
from cmgan_dist.training import choose_scoring as choose_scoring_module
from cmgan_dist.training import loop
from cmgan_dist.training.choose_scoring import asked_of, choose_scoring, measures_of
from cmgan_dist.training.loop import train
from tests.toy import small_config


def embedded(n: int, seed: int, labels: bool = True, captions: int = 1, informative: str = "") -> Embedded:
    """Items of three classes; blocks that `informative` names tell them or their partners apart, others are noise."""
    g = torch.Generator().manual_seed(seed)
    maps = torch.Generator().manual_seed(99)
    to_image, to_text = torch.randn(5, 12, generator=maps), torch.randn(5, 9, generator=maps)
    owner, classes = torch.arange(n).repeat_interleave(captions), torch.arange(n) % 3
    hidden = torch.randn(n, 5, generator=g)

    def made(rows: torch.Tensor, to_feature: torch.Tensor) -> Made:
        m = len(rows)
        feature, common = torch.randn(m, to_feature.shape[1], generator=g), torch.randn(m, 6, generator=g)
        logits = torch.randn(m, 3, generator=g)
        if "pair" in informative:
            feature = 0.1 * feature + hidden[rows] @ to_feature
        if "feature" in informative:
            feature = feature + 3 * torch.eye(3, to_feature.shape[1])[classes[rows]]
        if "common" in informative:
            common = common + 4 * torch.eye(6)[classes[rows]]
        if "posterior" in informative:
            logits = logits + 4 * torch.eye(3)[classes[rows]]
        return Made(feature, common, logits if labels else None)

    image, text = made(torch.arange(n), to_image), made(owner, to_text)
    return Embedded(image, text, owner, torch.eye(3)[classes].bool() if labels else None, [str(i) for i in range(n)])


def chosen(informative: str, *, labels: bool = True, **fields: object) -> Scoring:
    config = EvalConfig(**{"bank": 50, **fields})  # type: ignore[arg-type]
    data = [embedded(n, seed, labels, 2, informative) for n, seed in ((150, 1), (60, 2))]
    return choose_scoring(*data, config, False, 0, lambda line: None)


@pytest.mark.parametrize(("block", "objective"), [("posterior", "class"), ("common", "class"), ("pair", "pair")])
def test_the_block_that_tells_something_gets_the_share(block: str, objective: str) -> None:
    scoring = chosen(block)
    assert getattr(scoring.spec.shares[objective], block) >= 0.5  # type: ignore[index]
    assert set(scoring.spec.shares) == {"class", "pair", "both"}
    assert scoring.spec.objective == "both"


def test_what_is_chosen_reaches_more_than_each_block_alone() -> None:
    val = embedded(60, 2, True, 1, "pair common")
    scoring = choose_scoring(embedded(150, 1, True, 1, "pair common"), val, EvalConfig(), False, 0, lambda line: None)
    for objective, shares in scoring.spec.shares.items():
        scoring.shares = shares
        reached = measures_of(val.vectors(scoring))
        assert reached == pytest.approx(scoring.spec.validation[objective])
        for alone in (Shares(1, 0, 0), Shares(0, 1, 0), Shares(0, 0, 1)):
            scoring.shares = alone
            assert measures_of(val.vectors(scoring))[objective] <= reached[objective]


def test_pairs_without_labels_have_one_end() -> None:
    scoring = chosen("pair", labels=False, objective="class")
    assert set(scoring.spec.shares) == {"pair"}
    assert scoring.spec.objective == "pair"
    assert not scoring.spec.shares["pair"].posterior


@pytest.mark.parametrize(
    ("score", "shares", "standardise"),
    [("cosine", Shares(), False), ("zscore", Shares(), True), ("posterior", Shares(1.0, 0.0), False)],
)
def test_one_way_alone_can_be_asked_for(score: str, shares: Shares, standardise: bool) -> None:
    scoring = chosen("common", score=score, objective="class")
    assert scoring.spec.shares == dict.fromkeys(("class", "pair", "both"), shares)
    assert scoring.spec.standardise == standardise
    assert not any("pair" in name or "bank" in name for name in scoring.tensors())


def test_no_bank_and_no_heads() -> None:
    scoring = chosen("common feature", bank=0, pair_head=False, class_head=False)
    assert not any("pair" in name or "bank" in name or "class" in name for name in scoring.tensors())
    assert not any(shares.pair or shares.bank for shares in scoring.spec.shares.values())
    assert not scoring.spec.class_head


def test_a_class_head_has_half_of_the_posteriors_where_validation_is_likelier_by_it() -> None:
    used, unused = chosen("posterior feature"), chosen("posterior")
    assert used.spec.class_head == 0.5
    assert used.spec.kernels == {"image": "rbf", "text": "rbf"}
    assert not unused.spec.class_head
    assert not unused.spec.kernels
    assert not any("class" in name for name in unused.tensors())


def test_a_head_by_which_the_classes_are_no_likelier_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter((-0.5, -0.6))
    monkeypatch.setattr(choose_scoring_module._Choice, "likelihood", lambda self, multi: next(found))
    assert not chosen("posterior feature").spec.class_head


def test_a_head_by_which_map_falls_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_scoring_module, "MAP_SLACK", -1.0)
    assert not chosen("posterior feature").spec.class_head


@pytest.mark.parametrize(("chance", "mixed"), [(0.0, True), (100.0, False)])
def test_classes_are_scored_by_a_mixture_only_where_it_gains_more_than_chance(
    chance: float, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_scoring_module, "AP_CHANCE", chance)
    shares = chosen("posterior common").spec.shares["class"]
    assert (max(shares.posterior, shares.common, shares.pair) < 1) == mixed


def test_a_run_ends_with_a_scoring_and_chooses_anew_when_asked(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    config = small_config(8, eval__bank=20, train__epochs=2, train__val_every=1, train__tracker="none")
    config.data, config.output = str(feature_data(captions=2)), str(tmp_path / "run")
    train(config)
    first = read_model(config.output)
    assert first.scoring.spec.asked == asked_of(config.eval, True)
    found = run_task(open_task(config.output), baselines=False).record
    assert set(found["ends"]) == {"class", "pair"}
    model = cmgan_dist.load(config.output)
    assert model.encode_texts(torch.randn(3, 7).numpy()).shape == (3, model.dim)
    train(config)
    again = read_model(config.output)
    assert again.spec.files == first.spec.files
    config.eval.objective, config.eval.score = "class", "posterior"
    train(config)
    other = read_model(config.output)
    assert other.scoring.spec.objective == "class"
    assert other.scoring.shares == Shares(1.0, 0.0)
    assert other.spec.files != first.spec.files
    assert {k: v.tolist() for k, v in other.tensors.items()} == {k: v.tolist() for k, v in first.tensors.items()}


@pytest.mark.parametrize(("select", "epoch"), [("best", 1), ("last", 3)])
def test_the_best_or_the_last_generator_is_kept(
    select: str, epoch: int, feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter((0.9, 0.5, 0.7))
    monkeypatch.setattr(loop, "validation_of", lambda *a: (next(falling), {}))
    config = small_config(8, train__epochs=3, train__val_every=1, train__tracker="none", train__select=select)
    config.data, config.output = str(feature_data()), str(tmp_path / "run")
    train(config)
    progress = read_model(config.output).spec.progress
    assert progress["best_position"] == epoch * progress["epoch_samples"]
