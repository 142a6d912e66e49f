"""The rival methods: each loss against a naive loop of its paper's equation, and the whole bench on toy features."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import common
from bench.rivals import losses
from bench.rivals.__main__ import main
from bench.rivals.methods import METHODS, share_class
from bench.rivals.training import Fitted, batches, draws, embed, fit, measure, read_data
from cmgan_dist.errors import BadInput, run_main

ROWS, DIMS, CLASSES = 7, 4, 3


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.randn(ROWS, DIMS, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    return u, v


LABELS = torch.eye(CLASSES, dtype=torch.bool)[torch.tensor([0, 1, 2, 0, 0, 1, 1])]
CLASS = LABELS.int().argmax(1).tolist()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


def test_label_space_of_dscmr() -> None:
    scores = torch.randn(2, ROWS, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for side in scores:
        squares = sum(float(side[i, c] - float(CLASS[i] == c)) ** 2 for i in range(ROWS) for c in range(CLASSES))
        expected += math.sqrt(squares) / ROWS
    assert losses.dscmr_label_space(scores[0], scores[1], LABELS).item() == pytest.approx(expected)


def test_common_space_of_dscmr(pair: tuple[Tensor, Tensor]) -> None:
    u, v = (x.detach() for x in pair)
    expected = 0.0
    for x, y in ((u, v), (u, u), (v, v)):
        for i in range(ROWS):
            for j in range(ROWS):
                gamma = float(cosine(x[i], y[j])) / 2
                chance = 1 / (1 + math.exp(-gamma))
                expected -= math.log(chance if CLASS[i] == CLASS[j] else 1 - chance) / ROWS**2
    assert losses.dscmr_common_space(u, v, share_class(LABELS)).item() == pytest.approx(expected)


def test_invariance_of_dscmr(pair: tuple[Tensor, Tensor]) -> None:
    u, v = (x.detach() for x in pair)
    expected = math.sqrt(sum(float(u[i, d] - v[i, d]) ** 2 for i in range(ROWS) for d in range(DIMS))) / ROWS
    assert losses.dscmr_invariance(u, v).item() == pytest.approx(expected)


def test_structure_of_acmr(pair: tuple[Tensor, Tensor]) -> None:
    u, v = (x.detach() for x in pair)
    expected, margin, weight = 0.0, 3.0, 0.7
    for x, y in ((u, v), (v, u)):
        for i in range(ROWS):
            near, far = [], []
            for j in range(ROWS):
                distance = math.sqrt(sum(float(x[i, d] - y[j, d]) ** 2 for d in range(DIMS)))
                if CLASS[i] == CLASS[j]:
                    near.append(distance)
                else:
                    far.append(max(0.0, margin - distance))
            expected += (sum(near) / len(near) + weight * sum(far) / len(far)) / ROWS
    same = share_class(LABELS)
    assert losses.acmr_structure(u, v, same, margin, weight).item() == pytest.approx(expected, rel=1e-6)


def test_structure_of_acmr_without_other_classes(pair: tuple[Tensor, Tensor]) -> None:
    u, v = pair
    found = losses.acmr_structure(u, v, torch.ones(ROWS, ROWS, dtype=torch.bool), 1.0, 1.0)
    found.backward()
    assert found.item() == pytest.approx(2 * torch.cdist(u, v).mean().item())
    assert u.grad is not None
    assert torch.isfinite(u.grad).all()


def test_modality_of_acmr() -> None:
    image, text = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = -sum(math.log(1 / (1 + math.exp(-x))) for x in image.tolist()) / ROWS
    expected -= sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in text.tolist()) / ROWS
    assert losses.acmr_modality(image, text).item() == pytest.approx(expected)


def test_the_gradient_reaches_the_embeddings_reversed(pair: tuple[Tensor, Tensor]) -> None:
    u, v = pair
    weight = torch.randn(DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain = torch.autograd.grad(losses.acmr_modality(u @ weight, v @ weight), (u, v, weight))
    turned = [losses.reverse_gradient(x, 0.3) for x in (u, v)]
    assert torch.equal(turned[0], u)
    found = torch.autograd.grad(losses.acmr_modality(turned[0] @ weight, turned[1] @ weight), (u, v, weight))
    assert plain[0].abs().min() > 0
    for reversed_gradient, gradient in zip(found[:2], plain[:2], strict=True):
        torch.testing.assert_close(reversed_gradient, -0.3 * gradient)
    torch.testing.assert_close(found[2], plain[2])


def test_acmr_is_trained_against_its_modality_classifier() -> None:
    """A step along the modality term alone: its own gradient for the classifier, the opposite one for the encoders."""
    method = METHODS["ACMR"]
    settings = {**draws(method, 1)[0], "width": 64, "dropout": 0.0, "structure": 0.0}
    torch.manual_seed(0)
    model = method.build((5, 6, CLASSES), {**settings, "adversary": 2.0})
    image, text = torch.randn(ROWS, 5), torch.randn(ROWS, 6)

    def gradients(adversary: float) -> list[Tensor]:
        model.adversary = adversary
        model.zero_grad()
        model.loss(image, text, LABELS).backward()
        wanted = (model.image[1].weight, model.modality[1].weight)  # type: ignore[index]
        return [parameter.grad.clone() for parameter in wanted]

    none, strong = gradients(0.0), gradients(2.0)
    u, v = model(image, text)
    modality = losses.acmr_modality(model.modality(u).squeeze(1), model.modality(v).squeeze(1))  # type: ignore[operator]
    (plain,) = torch.autograd.grad(modality, [model.image[1].weight])  # type: ignore[index]
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(strong[0] - none[0], -2.0 * plain)
    torch.testing.assert_close(strong[1], none[1])


def test_prototype_contrast(pair: tuple[Tensor, Tensor]) -> None:
    u, v = (x.detach() for x in pair)
    prototypes = torch.randn(CLASSES, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, temperature = 0.0, 0.3
    for x in (u, v):
        for i in range(ROWS):
            terms = [math.exp(float(cosine(x[i], prototype)) / temperature) for prototype in prototypes]
            expected -= math.log(terms[CLASS[i]] / sum(terms)) / ROWS
    assert losses.prototype_contrast(u, v, prototypes, LABELS, temperature).item() == pytest.approx(expected)


def test_cross_entropy_of_several_labels_and_none() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3]])
    labels = torch.tensor([[True, False, True], [False, False, False]])
    logs = [x - math.log(sum(math.exp(y) for y in (1.0, 2.0, 0.5))) for x in (1.0, 0.5)]
    assert losses.soft_cross_entropy(logits, labels).item() == pytest.approx(-sum(logs) / 2 / 2)


def test_info_nce(pair: tuple[Tensor, Tensor]) -> None:
    u, v = (x.detach() for x in pair)
    expected, scale = 0.0, 5.0
    for x, y in ((u, v), (v, u)):
        for i in range(ROWS):
            terms = [math.exp(scale * float(cosine(x[i], y[j]))) for j in range(ROWS)]
            expected -= math.log(terms[i] / sum(terms)) / ROWS / 2
    assert losses.info_nce(u, v, scale).item() == pytest.approx(expected)


def test_max_of_hinges(pair: tuple[Tensor, Tensor]) -> None:
    u, v = (x.detach() for x in pair)
    expected, margin = 0.0, 0.4
    for x, y in ((u, v), (v, u)):
        for i in range(ROWS):
            own = float(cosine(x[i], y[i]))
            hinges = [max(0.0, margin - own + float(cosine(x[i], y[j]))) for j in range(ROWS) if j != i]
            expected += max(hinges) / ROWS
    assert losses.max_of_hinges(u, v, margin).item() == pytest.approx(expected)


def test_the_hardest_negative_may_have_a_negative_cosine() -> None:
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3])
    star = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert losses.max_of_hinges(star, star, 2.0).item() == pytest.approx(2 * (2 - 1 - 0.5))


def test_a_batch_has_pairs_and_every_image_once(feature_data: Callable[..., Path]) -> None:
    train = read_data(feature_data(captions=3)).scaled["train"]
    seen, texts = [], set()
    for _ in range(20):
        epoch = list(batches(train, 16, torch.Generator().manual_seed(len(seen))))
        assert [len(image) for image, _, _ in epoch] == [16] * 6
        images: list[int] = []
        for image, text, labels in epoch:
            rows = torch.cdist(image, train.image).argmin(1)
            text_rows = torch.cdist(text, train.text).argmin(1)
            assert torch.equal(train.text_owner[text_rows], rows)
            assert train.labels is not None
            assert labels is not None
            assert torch.equal(labels, train.labels[rows])
            images += rows.tolist()
            texts |= set(text_rows.tolist())
        assert sorted(images) == list(range(96))
        seen.append(images)
    assert seen[0] != seen[1]
    assert len(texts) > 250  # of 288


def test_the_best_check_is_returned(feature_data: Callable[..., Path]) -> None:
    data = read_data(feature_data())
    method = METHODS["CLIP4CMR (PCL)"]
    fitted: Fitted = fit(method, {**draws(method, 1)[0], "width": 64, "rate": 0.05}, data, 0, 40)
    assert measure(embed(fitted.model, data.scaled["val"]), fitted.way)["map/mean"] == pytest.approx(fitted.score)
    assert fitted.score > 0.8


def test_settings_that_are_drawn_are_of_the_space_and_repeat() -> None:
    for method in METHODS.values():
        found = draws(method, 30)
        assert found == draws(method, 30)
        assert found[:5] == draws(method, 5)
        for name, values in method.space.items():
            assert {settings[name] for settings in found} == set(values)


def run_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> int:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["rivals", *words, "--work", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return int(ended.value.code or 0)


def test_the_whole_bench(
    feature_data: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = feature_data("pairs", label_kind="none", captions=2)
    manifest = json.loads((pairs / "manifest.json").read_text())
    (pairs / "manifest.json").write_text(json.dumps({**manifest, "name": "unlabelled"}))
    words = ["--seeds", "2", "--tries", "2", "--epochs", "2", "--ours", "smoke"]
    assert run_bench(monkeypatch, tmp_path, "--data", str(feature_data()), "--data", str(pairs), *words) == 0
    labelled, unlabelled = (
        json.loads((tmp_path / "results" / f"rivals-{name}.json").read_text()) for name in ("toy", "unlabelled")
    )
    assert labelled["machine"]["commit"]
    assert {*METHODS, "ours (both)", "CCA", "logistic regression", "chance"} <= labelled["rows"].keys()
    assert METHODS.keys() & unlabelled["rows"].keys() == {"CLIP projection", "VSE++"}
    for record in (labelled, unlabelled):
        for name, row in record["rows"].items():
            assert len(row["measures"]) == (9 if record is labelled else 6), name
            assert all(0 <= value["mean"] <= 1 for value in row["measures"].values()), name
    assert all(labelled["rows"][name]["processor_seconds"]["mean"] > 0 for name in METHODS)
    shown = capsys.readouterr().out
    assert "DSCMR" in shown
    assert "processor" in shown


def test_raw_pairs_are_refused(raw_data: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="python -m shards features"):
        read_data(raw_data())
