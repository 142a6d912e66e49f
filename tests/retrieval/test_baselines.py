"""Baselines against scikit-learn, simulation, and what is published for the Wikipedia features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LogisticRegression, Ridge

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval import baselines
from cmgan_dist.retrieval.baselines import (
    baseline_table,
    best_baselines,
    cca,
    chance,
    chance_ap,
    logistic_regression,
    ridges_image_to_text,
)
from cmgan_dist.retrieval.metrics import Embeddings, evaluate, rank_classes

WIKIPEDIA = Path(__file__).parents[2] / "../shared/data/wikipedia_features"


def features(n: int, seed: int, classes: int = 4, labels: bool = True, captions: int = 1) -> Embeddings:
    """Image [n, 12] and text [n * captions, 7] features that share the class and three dimensions of the pair."""
    world = np.random.default_rng(0)
    to_image, to_text = world.normal(size=(classes + 3, 12)), world.normal(size=(classes + 3, 7))
    rng = np.random.default_rng(seed)
    onehot = np.eye(classes)[rng.integers(classes, size=n)]
    hidden = np.concatenate([2 * onehot, rng.normal(size=(n, 3))], axis=1)
    owner = np.repeat(np.arange(n), captions)
    image = hidden @ to_image + rng.normal(size=(n, 12))
    text = (hidden @ to_text)[owner] + rng.normal(size=(len(owner), 7))
    return Embeddings(
        torch.from_numpy(image).float(),
        torch.from_numpy(text).float(),
        torch.from_numpy(owner),
        torch.from_numpy(onehot).bool() if labels else None,
    )


def test_cca_equals_scikit_learn() -> None:
    data = features(300, 1)
    x, y = data.image.double().numpy(), data.text.double().numpy()
    ours = cca(x, y, dims=3)
    theirs = CCA(n_components=3, max_iter=5000, tol=1e-10).fit(x, y)
    for mine, other in zip((ours.image(x), ours.text(y)), theirs.transform(x, y), strict=True):
        for d in range(3):
            assert abs(np.corrcoef(mine[:, d], other[:, d])[0, 1]) == pytest.approx(1, abs=1e-4)
    # Canonical variates are white, and correlate with their partner alone.
    cross = ours.image(x).T @ ours.text(y) / len(x)
    np.testing.assert_allclose(ours.image(x).T @ ours.image(x) / len(x), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(cross, np.diag(np.diag(cross)), atol=1e-9)


def test_cca_with_more_dimensions_than_items_stays_finite_and_is_helped_by_ridge() -> None:
    rng = np.random.default_rng(2)
    to_image, to_text = rng.normal(size=(3, 120)), rng.normal(size=(3, 90))

    def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
        hidden = rng.normal(size=(n, 3))
        return hidden @ to_image + rng.normal(size=(n, 120)), hidden @ to_text + rng.normal(size=(n, 90))

    (x, y), (new_x, new_y) = pairs(60), pairs(200)
    test = Embeddings(torch.from_numpy(new_x), torch.from_numpy(new_y), torch.arange(200))
    plain, regular = (
        evaluate(cca(x, y, 3, (ridge, ridge))(test), "cosine")["recall/image_to_text@10"] for ridge in (0.0, 1.0)
    )
    assert regular > plain


def test_cca_with_a_ridge_and_a_power_is_that_of_its_equation() -> None:
    """The generalised eigenvalue problem (Hardoon et al., 2004, eq. 3.5 with a ridge a side), and its correlations."""
    data = features(200, 5)
    x, y = data.image.double().numpy(), data.text.double().numpy()
    a, b = x - x.mean(0), y - y.mean(0)
    c_x = a.T @ a / 200 + 0.3 * a.var(0).mean() * np.eye(12)
    c_y = b.T @ b / 200 + 2.0 * b.var(0).mean() * np.eye(7)
    c_xy = a.T @ b / 200
    squares, w = scipy.linalg.eigh(c_xy @ np.linalg.solve(c_y, c_xy.T), c_x)
    correlation = np.sqrt(squares[::-1][:4])
    ours, weighted = cca(x, y, 4, (0.3, 2.0)), cca(x, y, 4, (0.3, 2.0), power=1.5)
    np.testing.assert_allclose(np.abs(ours.image(x)), np.abs(a @ w[:, ::-1][:, :4]), atol=1e-9)
    np.testing.assert_allclose(np.diag(ours.image(x).T @ ours.text(y) / 200), correlation, atol=1e-9)
    np.testing.assert_allclose(weighted.text(y), ours.text(y) * correlation**1.5, atol=1e-9)


def test_ridge_equals_scikit_learn() -> None:
    data = features(200, 3)
    x, y = data.image.double().numpy(), data.text.double().numpy()
    across = next(ridges_image_to_text(x, y, (0.3,)))
    theirs = Ridge(alpha=0.3 * x.var(0).mean() * len(x)).fit(x, y)
    np.testing.assert_allclose(across.image(x), theirs.predict(x), atol=1e-8)
    np.testing.assert_array_equal(across.text(y), y)


def test_logistic_regression_solves_its_equation() -> None:
    """At the optimum the gradient of cross-entropy plus |w|^2 / 2C is nothing: of softmax, and of a class alone."""
    data = features(300, 3)
    assert data.labels is not None
    x, labels = data.image.double().numpy(), data.labels.numpy()
    scaled = (x - x.mean(0)) / x.std(0)
    probabilities = logistic_regression(x, labels, 0.01)(x)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    logits = np.log(probabilities)
    logits -= logits.mean(1, keepdims=True)
    design = np.concatenate([scaled, np.ones((300, 1))], axis=1)
    weight = np.linalg.lstsq(design, logits, rcond=None)[0]
    gradient = scaled.T @ (probabilities - labels) + weight[:-1] / 0.01
    assert np.abs(gradient).max() < 0.005 * np.abs(scaled.T @ labels).max()
    both = labels | labels[:, [1, 0, 2, 3]]
    several = logistic_regression(x, both, 0.01)(x)
    alone = LogisticRegression(C=0.01).fit(scaled, both[:, 0]).predict_proba(scaled)[:, 1]
    np.testing.assert_allclose(several[:, 0], alone, atol=5e-3)


def test_classes_that_the_training_split_lacks_have_no_probability() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    labels = np.eye(4, dtype=bool)[np.arange(40) % 2 * 2]
    probabilities = logistic_regression(x, labels, 0.1)(x)
    assert (probabilities[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("captions", [1, 2])
def test_table_beats_chance_and_chooses_on_validation_only(captions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val, test = (features(n, seed, captions=captions) for n, seed in ((300, 1), (80, 2), (100, 3)))
    scored = []
    for name in ("score_of", "recall_of"):
        monkeypatch.setattr(baselines, name, lambda metrics: scored.append(metrics["images"]) or 0.0)
    baseline_table(best_baselines(train, val), test)
    assert set(scored) == {80}
    monkeypatch.undo()
    table = baseline_table(best_baselines(train, val), test)
    assert list(table) == ["CCA", "ridge image to text", "logistic regression", "chance"]
    for name in list(table)[:-1]:
        assert table[name]["map/mean"] > 1.5 * table["chance"]["map/mean"]
        assert table[name]["recall/text_to_image@5"] > 1.5 * table["chance"]["recall/text_to_image@5"]
    assert table["CCA"]["settings"]["dims"] <= 7
    assert table["logistic regression"]["map/mean"] > table["CCA"]["map/mean"]
    assert table["CCA"]["recall/text_to_image@10"] > table["logistic regression"]["recall/text_to_image@10"]


def test_table_without_labels() -> None:
    train, val, test = (features(n, n, labels=False) for n in (300, 80, 100))
    table = baseline_table(best_baselines(train, val), test)
    assert list(table) == ["CCA", "ridge image to text", "chance"]
    assert table["CCA"]["recall/image_to_text@1"] > 3 * table["chance"]["recall/image_to_text@1"]


def test_table_names_features_that_disagree() -> None:
    data = features(30, 1)
    other = Embeddings(data.image[:, :5], data.text, data.text_owner, data.labels)
    with pytest.raises(BadInput, match="the val features have other dimensions"):
        best_baselines(data, other)


@pytest.mark.parametrize(("relevant", "gallery"), [(1, 1), (1, 9), (4, 9), (9, 9), (2, 30)])
@pytest.mark.parametrize("k", [None, 1, 5, 100])
def test_chance_ap_equals_simulation(relevant: int, gallery: int, k: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    angle = torch.rand(800, gallery, generator=g, dtype=torch.float64)
    labels = (torch.arange(gallery) < relevant)[:, None]
    aps = []
    for one in angle:
        items = torch.stack([one.cos(), one.sin()], 1)
        ranking = rank_classes(torch.tensor([[1.0, 0.0]]), items, torch.tensor([[True]]), labels, ks=(k or 1,))
        aps.append((ranking.ap_at[k] if k else ranking.ap)[0])
    expected = chance_ap(np.array([relevant]), gallery, k)[0]
    assert expected == pytest.approx(np.mean(aps), abs=4 * np.std(aps) / np.sqrt(len(aps)) + 1e-12)


def test_chance_equals_the_mean_of_shuffled_embeddings() -> None:
    g = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9])
    labels = torch.rand(10, 3, generator=g) < 0.4
    runs = []
    for _ in range(300):
        image, text = torch.randn(10, 5, generator=g), torch.randn(12, 5, generator=g)
        runs.append(evaluate(Embeddings(image, text, owner, labels), "cosine", map_ks=(3,), recall_ks=(1, 4)))
    expected = chance(Embeddings(image, text, owner, labels), map_ks=(3,), recall_ks=(1, 4))
    for key in expected:
        # With the query in its gallery it comes first: chance there is of a gallery that knows nothing of the query.
        if key.startswith(("map", "recall")) and not key.endswith("_to_all"):
            values = [run[key] for run in runs]
            assert expected[key] == pytest.approx(np.mean(values), abs=4 * np.std(values) / np.sqrt(len(values))), key


def test_published_cca_on_wikipedia() -> None:
    if not (WIKIPEDIA / "raw_features.mat").is_file():
        pytest.skip("the Wikipedia features are not in shared/data: they cannot be redistributed with the code")
    arrays = scipy.io.loadmat(WIKIPEDIA / "raw_features.mat")
    lines = (WIKIPEDIA / "testset_txt_img_cat.list").read_text().splitlines()
    labels = torch.eye(10)[[int(line.split()[-1]) - 1 for line in lines]].bool()
    test = Embeddings(torch.from_numpy(arrays["I_te"]), torch.from_numpy(arrays["T_te"]), torch.arange(693), labels)
    result = evaluate(cca(arrays["I_tr"], arrays["T_tr"], dims=7)(test), "zscore")
    assert result["map/image_to_text"] == pytest.approx(0.248, abs=0.003)
    assert result["map/text_to_image"] == pytest.approx(0.202, abs=0.003)
    # Four digits of this implementation, so that a change shows.
    assert result["map/image_to_text"] == pytest.approx(0.2465, abs=1e-4)
    assert result["map/text_to_image"] == pytest.approx(0.2017, abs=1e-4)
    assert chance(test)["map/mean"] == pytest.approx(0.1184, abs=1e-4)
