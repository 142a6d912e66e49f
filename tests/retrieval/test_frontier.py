"""Points between two ends: those of the matrices of similarities, measured by the metrics of vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmgan_dist.models.scoring import Scoring, ScoringSpec, Shares
from cmgan_dist.retrieval.baselines import CLASSIFIER, PAIRS, Projection
from cmgan_dist.retrieval.embed import Embedded, Made
from cmgan_dist.retrieval.frontier import STEPS, TEMPERATURES, baseline_frontier, measured, model_frontier
from cmgan_dist.retrieval.metrics import Embeddings, evaluate

LABELS = torch.eye(3).bool()[torch.arange(30) % 3]


def test_a_matrix_reaches_what_its_vectors_reach() -> None:
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(30, 6, generator=g)) for _ in range(2))
    expected = evaluate(Embeddings(image, text, torch.arange(30), LABELS), all_modal=False, recall_ks=(10,))
    recall = (expected["recall/image_to_text@10"] + expected["recall/text_to_image@10"]) / 2
    assert measured(7 * (image @ text.T) - 3, LABELS) == pytest.approx((expected["map/mean"], recall), abs=1e-9)


def test_a_model_goes_from_end_to_end_and_the_first_caption_counts() -> None:
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(30).repeat_interleave(2)
    image = Made(torch.randn(30, 4, generator=g), torch.randn(30, 5, generator=g), 3 * LABELS.float())
    text = Made(torch.randn(60, 4, generator=g), image.common[owner].clone(), 3 * LABELS[owner].float())
    text.common[1::2] = torch.randn(30, 5, generator=g)
    ends = {"class": Shares(1, 0, 0), "both": Shares(0.5, 0.5, 0), "pair": Shares(0, 1, 0)}
    scoring = Scoring(ScoringSpec("both", {}, ends), {}, False)  # type: ignore[arg-type]
    points = model_frontier(scoring, Embedded(image, text, owner, LABELS, [str(i) for i in range(30)]))
    assert len(points) == 2 * STEPS + 1
    assert points[0][0] == pytest.approx(1)
    assert points[-1][1] == 1
    assert points[-1][0] < 1
    assert not model_frontier(scoring, Embedded(image, text, owner, None, [str(i) for i in range(30)]))
    assert not model_frontier(Scoring.plain(), Embedded(image, text, owner, LABELS, [str(i) for i in range(30)]))


def test_baselines_are_mixed_by_the_log_of_the_chance() -> None:
    rng = np.random.default_rng(0)
    chances = {"image": rng.dirichlet(np.ones(3), 30), "text": rng.dirichlet(np.ones(3), 30)}
    near = {name: rng.normal(size=(30, 4)) for name in chances}
    best = {
        CLASSIFIER: Projection(lambda x: chances["image"], lambda x: chances["text"], {}, "inner"),
        PAIRS: Projection(lambda x: near["image"], lambda x: near["text"], {}),
    }
    test = Embeddings(torch.ones(30, 2), torch.ones(30, 2), torch.arange(30), LABELS)
    points = baseline_frontier(best, test)
    assert len(points) == len(TEMPERATURES) + 2
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in near.items()}
    mixed = np.log(chances["image"] @ chances["text"].T) + unit["image"] @ unit["text"].T / TEMPERATURES[0]
    assert points[-2] == pytest.approx(measured(torch.from_numpy(mixed), LABELS), abs=1e-6)
    assert not baseline_frontier({PAIRS: best[PAIRS]}, test)
