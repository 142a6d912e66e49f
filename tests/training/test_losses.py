"""Losses against naive loops and torch's own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from cmgan_dist.training import losses


def test_bce_is_binary_cross_entropy_with_half_weights() -> None:
    torch.manual_seed(0)
    real, fake, mismatched = (torch.randn(9) * 4 for _ in range(3))
    mask = torch.tensor([True] * 6 + [False] * 3)
    ours = losses.discriminator_loss("bce", real, [(fake, 0.5, None), (mismatched, 0.5, mask)])
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(9))
    expected += 0.5 * F.binary_cross_entropy_with_logits(fake, torch.zeros(9))
    expected += 0.5 * sum(-math.log(1 - torch.sigmoid(x.double()).item()) for x in mismatched[:6]) / 9
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        losses.generator_loss("bce", fake), F.binary_cross_entropy_with_logits(fake, torch.ones(9))
    )


def test_bce_on_large_logits_is_finite() -> None:
    big = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = losses.discriminator_loss("bce", big, [(big, 1.0, None)])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(big.grad).all()


def test_hinge_and_wasserstein() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert losses.discriminator_loss("hinge", real, [(fake, 1.0, None)]).item() == (0 + 0.5) / 2 + (0 + 1.25) / 2
    assert losses.discriminator_loss("wgan-gp", real, [(fake, 1.0, None)]).item() == -1.25 - 1.375
    assert losses.generator_loss("hinge", fake).item() == 1.375


def test_info_nce_against_a_loop() -> None:
    torch.manual_seed(1)
    image, text = torch.randn(6, 4), torch.randn(6, 4)
    ours = losses.info_nce(image[2:5], text[2:5], image, text, 2, 0.1)
    total = 0.0
    for i in range(2, 5):
        for a, gallery in ((image[i], text), (text[i], image)):
            scores = [F.cosine_similarity(a, b, dim=0).item() / 0.1 for b in gallery]
            total -= scores[i] - math.log(sum(math.exp(s) for s in scores))
    assert abs(ours.item() - total / 6) < 1e-5


def test_class_contrastive_against_a_loop() -> None:
    torch.manual_seed(2)
    query, gallery = torch.randn(4, 3), torch.randn(5, 3)
    positive = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    total = 0.0
    for i in range(4):
        scores = [F.cosine_similarity(query[i], g, dim=0).item() / 0.2 for g in gallery]
        norm = math.log(sum(math.exp(s) for s in scores))
        own = [s - norm for s, p in zip(scores, positive[i], strict=True) if p]
        total -= sum(own) / max(len(own), 1)
    assert abs(losses.class_contrastive(query, gallery, positive, 0.2).item() - total / 4) < 1e-5


def test_multi_label_classification_is_bce_per_class() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
    expected = F.binary_cross_entropy(torch.sigmoid(logits), labels.float())
    torch.testing.assert_close(losses.classification(logits, labels, multi=True), expected)
    one_hot = torch.eye(3).bool()[[0, 2, 1, 1, 0]]
    expected = F.nll_loss(F.log_softmax(logits, 1), torch.tensor([0, 2, 1, 1, 0]))
    torch.testing.assert_close(losses.classification(logits, one_hot, multi=False), expected)


def test_gradient_penalties_of_a_linear_function_are_known() -> None:
    weight = torch.tensor([3.0, 4.0])
    x = torch.randn(7, 2, requires_grad=True)
    logits = x @ weight
    assert losses.squared_gradient_norm(logits, [x]).item() == 25.0
    torch.testing.assert_close(losses.gradient_penalty(x @ weight, [x]), torch.tensor(16.0))
