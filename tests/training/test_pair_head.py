"""The pair head: its loss against loops, and what validation makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmgan_dist.retrieval.cca import PairedRows
from cmgan_dist.retrieval.metrics import Embeddings, pair_recall
from cmgan_dist.training import pair_head
from cmgan_dist.training.pair_head import fit_pair_head, multi_positive_nce


def features(n: int, seed: int, captions: tuple[int, ...] = (1, 3), noise: float = 0.5) -> Embeddings:
    """Images of 12 and texts of 9 numbers that share 4 hidden ones; images have the captions in turn."""
    maps = torch.Generator().manual_seed(7)
    to_image, to_text = torch.randn(4, 12, generator=maps), torch.randn(4, 9, generator=maps)
    g = torch.Generator().manual_seed(seed)
    owner = torch.arange(n).repeat_interleave(torch.tensor([captions[i % len(captions)] for i in range(n)]))
    hidden = torch.randn(n, 4, generator=g)
    image = hidden @ to_image + noise * torch.randn(n, 12, generator=g) + 3
    return Embeddings(image, hidden[owner] @ to_text + noise * torch.randn(len(owner), 9, generator=g) - 1, owner)


def test_the_loss_is_that_of_loops() -> None:
    g = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(4, 6, generator=g)), F.normalize(torch.randn(7, 6, generator=g))
    owner, temperature = torch.tensor([0, 0, 1, 2, 2, 2, 3]), 0.3
    scores = (image @ text.T / temperature).tolist()
    to_image = [
        -math.log(math.exp(scores[o][t]) / sum(math.exp(row[t]) for row in scores)) for t, o in enumerate(owner)
    ]
    to_text = []
    for t, o in enumerate(owner.tolist()):
        others = [scores[o][u] for u in range(7) if owner[u] != o]
        to_text.append(-math.log(math.exp(scores[o][t]) / (math.exp(scores[o][t]) + sum(map(math.exp, others)))))
    expected = (sum(to_image) / 7 + sum(to_text) / 7) / 2
    assert float(multi_positive_nce(image, text, owner, temperature)) == pytest.approx(expected, rel=1e-5)


def test_one_caption_each_is_info_nce() -> None:
    from cmgan_dist.training.losses import info_nce

    g = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(5, 6, generator=g)), F.normalize(torch.randn(5, 6, generator=g))
    expected = info_nce(image, text, image, text, 0, 0.1)
    torch.testing.assert_close(multi_positive_nce(image, text, torch.arange(5), 0.1), expected)


def test_it_finds_partners_better_than_its_start_and_alike_each_time() -> None:
    train, val = features(600, 1), features(100, 2)
    heads = [fit_pair_head(train, val, 3, lambda line: None) for _ in range(2)]
    assert heads[0] is not None
    assert heads[1] is not None
    for a, b in zip(heads[0].weights, heads[1].weights, strict=True):
        assert torch.equal(a, b)

    def reached(head: pair_head.PairHead, data: Embeddings) -> float:
        return pair_recall(Embeddings(*head(data.image, data.text), data.text_owner), 1)

    rows = PairedRows(train.image[train.text_owner].double().numpy(), train.text.double().numpy()).solve((0.0, 0.0))
    plain = pair_head.PairHead(
        (torch.from_numpy(rows.image).float(), torch.from_numpy(rows.text).float()),
        (
            -train.image.mean(0) @ torch.from_numpy(rows.image).float(),
            -train.text.mean(0) @ torch.from_numpy(rows.text).float(),
        ),
    )
    test = features(200, 4)
    assert reached(heads[0], test) > 20 * 1 / 200
    assert reached(heads[0], test) >= reached(plain, test) - 0.02


def test_refining_that_brings_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val, said = features(200, 1), features(60, 2), list[str]()
    spoilt = pair_head.PairHead((torch.zeros(12, 4), torch.zeros(9, 4)), (torch.ones(4), torch.ones(4)))
    monkeypatch.setattr(pair_head, "_refined", lambda *a: iter([spoilt]))
    head = fit_pair_head(train, val, 0, said.append)
    assert head is not None
    assert [line.split(":")[0] for line in said] == ["pair head"]
    assert pair_recall(Embeddings(*head(val.image, val.text), val.text_owner)) > 0.5


def test_features_without_variance_have_no_head() -> None:
    train, val = features(40, 1), features(30, 2)
    flat = Embeddings(torch.ones(40, 12), train.text, train.text_owner)
    assert fit_pair_head(flat, val, 0, lambda line: None) is None


def test_images_without_a_caption_are_left_out() -> None:
    train = features(60, 1, captions=(2, 0))
    assert fit_pair_head(train, features(30, 2), 0, lambda line: None) is not None
    assert np.isfinite(train.image.numpy()).all()
