"""Vectors and their scores, against the formula of each block; what is read is what was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmgan_dist.errors import BadInput
from cmgan_dist.models.generator import Modality
from cmgan_dist.models.saved import read_model
from cmgan_dist.models.scoring import Scoring, ScoringSpec, Shares
from tests.toy import mixed_scoring, save_untrained, small_config

DIMS: dict[Modality, int] = {"image": 12, "text": 7}


def random_items(modality: Modality, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [n, F], common representations [n, 8] and logits [n, 3]."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, dim, generator=g) for dim in (DIMS[modality], 8, 3))  # type: ignore[return-value]


@pytest.fixture
def scoring(feature_data: Callable[..., Path], tmp_path: Path) -> Scoring:
    return mixed_scoring(save_untrained(tmp_path / "run", feature_data(), small_config(8)), 3)


def naive_blocks(scoring: Scoring, modality: Modality, item: int, made: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """Posterior, common and pair block of one item, by numpy."""
    kept = {k: v.double().numpy() for k, v in scoring.tensors().items() if k != "spec"}
    feature, common, logits = (x[item].double().numpy() for x in made)
    scaled = (feature - kept[f"{modality}_class_centre"]) * kept[f"{modality}_class_scale"]
    if modality == "image":
        apart = [((scaled - z) ** 2).sum() for z in kept["image_class_landmarks"]]
    else:
        positive = np.maximum(scaled, 0)
        apart = [((positive - z) ** 2 / (positive + z)).sum() for z in kept["text_class_landmarks"]]
    head = np.exp(-np.array(apart)) @ kept[f"{modality}_class_weight"] + kept[f"{modality}_class_bias"]

    def probabilities(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x)) / math.sqrt(3) if scoring.multi_label else np.exp(x) / np.exp(x).sum()

    posterior = 0.7 * probabilities(logits) + 0.3 * probabilities(head)
    c = (common - kept[f"{modality}_mean"]) / kept[f"{modality}_std"]
    p = feature @ kept[f"{modality}_pair_weight"] + kept[f"{modality}_pair_bias"]
    return [posterior, c / np.linalg.norm(c), p / np.linalg.norm(p)]


def naive_score(shares: Shares, a: list[np.ndarray], b: list[np.ndarray]) -> float:
    weights = (shares.posterior, shares.common, shares.pair)
    return float(sum(w * x @ y for w, x, y in zip(weights, a, b, strict=True)))


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("bank", [0.0, 0.5, 1.0])
def test_inner_products_are_the_scores(bank: float, multi: bool, scoring: Scoring) -> None:
    scoring.multi_label = multi
    shares = scoring.shares = replace(scoring.shares, bank=bank)
    made = {m: random_items(m, n, n) for m, n in (("image", 5), ("text", 9))}
    image, text = (scoring(m, *items) for m, items in made.items())
    assert image.shape[1] == text.shape[1] == scoring.dim(8, 3) == 3 + 8 + 6 + 2 * (bank > 0)
    assert max(float(x.norm(dim=1).max()) for x in (image, text)) <= 1 + 1e-6
    kept = {k: v.double().numpy() for k, v in scoring.tensors().items() if k != "spec"}
    stored = {m: [kept[f"{m}_bank_{name}"] for name in ("posterior", "common", "pair")] for m in made}

    def taken_off(modality: Modality, blocks: list[np.ndarray]) -> float:
        """Log-mean-exp of an item's scores with the other modality's bank."""
        other = stored["text" if modality == "image" else "image"]
        scores = [naive_score(shares, blocks, [block[k] for block in other]) for k in range(5)]
        return bank * math.log(sum(math.exp(shares.sharpness * s) for s in scores) / 5) / shares.sharpness

    for i in range(5):
        for t in range(9):
            a, b = naive_blocks(scoring, "image", i, made["image"]), naive_blocks(scoring, "text", t, made["text"])
            expected = naive_score(shares, a, b)
            if bank:
                expected = (expected - taken_off("image", a) - taken_off("text", b)) / (2 + bank**2)
            assert float(image[i] @ text[t]) == pytest.approx(expected, abs=1e-6)


def test_a_plain_scoring_is_the_cosine() -> None:
    made = random_items("image", 5, 0)
    torch.testing.assert_close(Scoring.plain()("image", *made), F.normalize(made[1]))


def test_each_objective_has_shares_of_its_own(scoring: Scoring) -> None:
    made = random_items("text", 4, 1)
    of_class = scoring.made_for("class")
    posterior = np.stack([naive_blocks(scoring, "text", i, made)[0] for i in range(4)]) * math.sqrt(0.9)
    np.testing.assert_allclose(of_class("text", *made)[:, :3].numpy(), posterior, rtol=1e-5)
    assert of_class.dim(8, 3) == of_class("text", *made).shape[1] == 11
    assert scoring.shares != of_class.shares


def test_what_is_read_is_what_was_saved(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    generator = save_untrained(tmp_path / "run", feature_data(), small_config(8), mixed=True)
    saved, expected = read_model(tmp_path / "run"), mixed_scoring(generator, 3)
    assert saved.scoring.spec == expected.spec
    assert saved.dim == 19
    made = random_items("image", 5, 0)
    assert torch.equal(saved.scoring("image", *made), expected("image", *made))
    assert not any(name.startswith("scoring/") for name in saved.tensors)


@pytest.mark.parametrize(
    "text", [b"{}", b"[1]", b"no JSON", b'{"objective": "class", "asked": {}, "shares": {"x": {"y": 1}}}']
)
def test_a_scoring_that_cannot_be_read_is_refused(
    text: bytes, feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"spec": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    monkeypatch.setattr(Scoring, "tensors", lambda self: spec)
    save_untrained(tmp_path / "run", feature_data(), small_config(8), mixed=True)
    with pytest.raises(BadInput, match=r"model.safetensors has a scoring that cannot be read"):
        read_model(tmp_path / "run")


def test_a_class_head_without_its_tensors_is_no_scoring() -> None:
    with pytest.raises(KeyError):
        Scoring(ScoringSpec("pair", {}, {"pair": Shares()}, kernels={"image": "rbf"}), {}, False)


def test_an_objective_without_shares_is_no_scoring() -> None:
    with pytest.raises(KeyError):
        Scoring(ScoringSpec("class", {}, {"pair": Shares()}), {}, False)
