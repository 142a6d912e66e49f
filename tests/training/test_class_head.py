"""The class head against scikit-learn's kernels and kernel ridge, and what validation makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import chi2_kernel, rbf_kernel

from cmgan_dist.models.kernel_classifier import KernelClassifier, distance
from cmgan_dist.models.scoring import posterior_of
from cmgan_dist.retrieval.metrics import Embeddings
from cmgan_dist.training import class_head
from cmgan_dist.training.class_head import RIDGES, TEMPERATURES, WIDTHS, fit_class_head, is_histogram, log_likelihood


def items(n: int, seed: int, *, histograms: bool = False, multi: bool = False, captions: int = 2) -> Embeddings:
    """Items of three classes, each in two clusters that no linear map tells from those of another class."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.arange(n) % 3
    labels = torch.eye(3)[classes].bool()
    if multi:
        labels |= torch.eye(3)[torch.randint(3, (n,), generator=g)].bool()
    owner = torch.arange(n).repeat_interleave(captions)
    centres = torch.randn(3, 7, generator=torch.Generator().manual_seed(9))

    def made(rows: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(2, (len(rows), 1), generator=g) * 2 - 1
        x = 3 * sign * (labels[rows].float() @ centres) + 0.7 * torch.randn(len(rows), 7, generator=g)
        return x.softmax(1) if histograms else 5 * x + 2

    return Embeddings(made(torch.arange(n)), made(owner), owner, labels)


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_distances_are_those_of_loops_and_kernels_those_of_scikit_learn(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmgan_dist.models.kernel_classifier.CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr("cmgan_dist.models.kernel_classifier.ROWS", min(chunk, 512))
    rng = np.random.default_rng(0)
    x, z = rng.random((5, 4)), rng.random((3, 4))
    x[0, 1] = z[:, 1] = 0
    a, b = torch.from_numpy(x), torch.from_numpy(z)
    chi = [[sum((p - q) ** 2 / (p + q) for p, q in zip(u, v, strict=True) if p + q) for v in z] for u in x]
    np.testing.assert_allclose(distance("chi2", a, b).numpy(), chi, rtol=1e-12)
    np.testing.assert_allclose(torch.exp(-2 * distance("chi2", a, b)).numpy(), chi2_kernel(x, z, 2.0), rtol=1e-12)
    np.testing.assert_allclose(torch.exp(-2 * distance("rbf", a, b)).numpy(), rbf_kernel(x, z, 2.0), rtol=1e-12)


@pytest.mark.parametrize("histograms", [False, True])
def test_outputs_are_those_of_kernel_ridge_with_the_chosen_settings(histograms: bool) -> None:
    train, val, said = items(90, 1, histograms=histograms), items(60, 2, histograms=histograms), list[str]()
    heads = fit_class_head(train, val, False, 0, said.append)
    assert heads is not None
    assert train.labels is not None
    for modality, line in zip(("image", "text"), said, strict=True):
        kernel, width_of, ridge_of = line.split("s, ")[1].split(", ")
        width, ridge = float(width_of.split()[1]), float(ridge_of.split()[1])
        assert kernel == ("chi2" if histograms else "rbf")
        x, new = ((d.image if modality == "image" else d.text).double().numpy() for d in (train, val))
        y = train.labels.double().numpy() if modality == "image" else train.labels[train.text_owner].double().numpy()
        if histograms:
            mean = -np.log(chi2_kernel(x, gamma=1.0)).mean()
            matrices = [chi2_kernel(each, x, width / mean) for each in (x, new)]
        else:
            scaled = [(each - x.mean(0)) / x.std(0) for each in (x, new)]
            mean = -np.log(rbf_kernel(scaled[0], gamma=1.0)).mean()
            matrices = [rbf_kernel(each, scaled[0], width / mean) for each in scaled]
        expected = KernelRidge(alpha=ridge, kernel="precomputed").fit(matrices[0], y - y.mean(0)).predict(matrices[1])
        head = heads[modality]
        outputs = (head(torch.from_numpy(new)) - head.bias).numpy()
        factors = outputs / expected
        assert min(abs(factors.mean() - t) for t in TEMPERATURES) < 1e-6
        np.testing.assert_allclose(factors, factors.mean(), rtol=1e-6)
        np.testing.assert_allclose(head.bias.exp().numpy(), y.mean(0))


def likeliest(plain: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> float:
    """The temperature under which classes are likeliest."""
    return max(TEMPERATURES, key=lambda t: log_likelihood(posterior_of(t * plain + bias, False), y, False))


def test_settings_are_the_likeliest_of_the_validation_split() -> None:
    train, val, said = items(90, 1), items(60, 2), list[str]()
    heads = fit_class_head(train, val, False, 0, said.append)
    assert heads is not None
    assert val.labels is not None
    y = val.labels.double()
    best = log_likelihood(posterior_of(heads["image"](val.image), False), y, False)
    regression = class_head._Ridge(class_head._items(train, "image"), class_head._items(val, "image"), False)
    width = float(said[0].split("width ")[1].split(",")[0])
    for settings in [(each, 1.0) for each in WIDTHS] + [(width, each) for each in RIDGES]:
        reached, weight = regression.solve(*settings)
        made = regression.classifier(settings[0], weight)
        assert log_likelihood(posterior_of(made(val.image), False), y, False) == pytest.approx(reached)
        outputs = made(val.image) - made.bias
        assert any(likeliest(outputs / t, made.bias, y) == t for t in TEMPERATURES)
        assert reached <= best + 1e-12


@pytest.mark.parametrize("multi", [False, True])
def test_it_tells_classes_that_no_linear_map_does(multi: bool) -> None:
    train, val, test = (items(n, seed, multi=multi) for n, seed in ((300, 1), (90, 2), (90, 3)))
    heads = fit_class_head(train, val, multi, 0, lambda line: None)
    assert heads is not None
    assert test.labels is not None
    found = posterior_of(heads["image"](test.image), multi) * (3**0.5 if multi else 1)
    if multi:
        assert float(((found > 0.5) == test.labels).double().mean()) > 0.9
    else:
        assert float((found.argmax(1) == test.labels.double().argmax(1)).double().mean()) > 0.95


@pytest.mark.parametrize("multi", [False, True])
def test_the_likelihood_is_that_of_loops(multi: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=g, dtype=torch.float64)
    y = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 1]]
    y[0, 1] = float(multi)
    p = logits.sigmoid() if multi else logits.softmax(1)
    each = [
        sum(np.log(float(p[i, c]) if y[i, c] else 1 - float(p[i, c])) for c in range(3) if multi or y[i, c])
        for i in range(4)
    ]
    assert log_likelihood(posterior_of(logits, multi), y, multi) == pytest.approx(sum(each) / 4)


def test_no_more_items_are_kept_than_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_head, "LANDMARKS", 50)
    heads = [fit_class_head(items(90, 1), items(60, 2), False, 3, lambda line: None) for _ in range(2)]
    assert heads[0] is not None
    assert heads[1] is not None
    assert heads[0]["text"].landmarks.shape == (50, 7)
    assert torch.equal(heads[0]["image"].weight, heads[1]["image"].weight)


def test_what_cannot_be_learned_from_has_no_head() -> None:
    train, val = items(40, 1), items(30, 2)
    flat = Embeddings(torch.ones(40, 7), train.text, train.text_owner, train.labels)
    assert fit_class_head(flat, val, False, 0, lambda line: None) is None
    bare = Embeddings(val.image, val.text, val.text_owner, torch.zeros(30, 3, dtype=torch.bool))
    assert fit_class_head(train, bare, False, 0, lambda line: None) is None


@pytest.mark.parametrize("size", [1e-41, 1e-39, 1e17])
def test_a_feature_that_is_as_good_as_constant_does_not_count(size: float) -> None:
    train, val = items(60, 1), items(40, 2)
    g = torch.Generator().manual_seed(0)
    plain = fit_class_head(train, val, False, 0, lambda line: None)
    for data in (train, val):
        data.image[:, 0] = size
        data.image[:, 1] = 1 + 1.2e-7 * torch.randint(-1, 2, (len(data.image),), generator=g)
    if size < 1:
        train.image[:, 0] *= torch.rand(60, generator=g)
    heads = fit_class_head(train, val, False, 0, lambda line: None)
    assert plain is not None
    assert heads is not None
    assert heads["image"].scale[:2].tolist() == [0, 0]
    assert all(tensor.isfinite().all() for tensor in heads["image"].tensors("image").values())
    torch.testing.assert_close(heads["text"].weight, plain["text"].weight)


def test_a_matrix_that_cannot_be_solved_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_head, "RIDGES", (-2.0,))
    said: list[str] = []
    assert fit_class_head(items(60, 1), items(40, 2), False, 0, said.append) is None
    assert said == ["class head: none, the images' features have no kernel that can be solved"]


def test_items_without_a_label_are_left_out() -> None:
    train, val = items(60, 1), items(40, 2)
    assert train.labels is not None
    some = train.labels.clone()
    some[::2] = False
    rows = (train.text_owner % 2 == 1).nonzero()[:, 0]
    half = Embeddings(train.image[1::2], train.text[rows], train.text_owner[rows] // 2, train.labels[1::2])
    found = [
        fit_class_head(each, val, False, 0, lambda line: None)
        for each in (Embeddings(train.image, train.text, train.text_owner, some), half)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0]["text"].weight, found[1]["text"].weight)


def test_histograms_are_told_by_their_sums() -> None:
    x = torch.rand(9, 5)
    assert is_histogram(x / x.sum(1, keepdim=True))
    assert not is_histogram(x)
    assert not is_histogram(x - 0.5)
    wide = torch.rand(4, class_head.MOST_BINS + 1)
    assert not is_histogram(wide / wide.sum(1, keepdim=True))


def test_a_classifier_comes_back_from_its_tensors() -> None:
    heads = fit_class_head(items(60, 1), items(40, 2), False, 0, lambda line: None)
    assert heads is not None
    again = KernelClassifier.of(heads["image"].tensors("image"), "image", "rbf")
    x = items(5, 3).image
    torch.testing.assert_close(again(x), heads["image"](x), rtol=1e-4, atol=1e-4)
