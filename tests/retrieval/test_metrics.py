"""The metrics against naive loops, scikit-learn and small cases worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval import metrics, ranks
from cmgan_dist.retrieval.metrics import (
    Embeddings,
    common_space,
    direction_scores,
    evaluate,
    l2_normalise,
    pair_ranks,
    rank_classes,
    score_of,
    top_k,
    unit_vectors,
    zscore,
)


def made(
    n: int = 40, captions: tuple[int, ...] = (1,), classes: int = 5, seed: int = 0, multi: bool = False
) -> Embeddings:
    """Images with `captions` texts each, in turn; every text lies near its image."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor([captions[i % len(captions)] for i in range(n)]))
    owner = owner[torch.randperm(len(owner), generator=g)]
    image = torch.randn(n, 6, generator=g)
    text = image[owner] + 1.5 * torch.randn(len(owner), 6, generator=g)
    labels = torch.zeros(n, classes, dtype=torch.bool)
    for i in range(n):
        labels[i, torch.randperm(classes, generator=g)[: 1 + (i % 3 if multi else 0)]] = True
    return Embeddings(image, text, owner, labels)


def naive_ap(similarity: list[float], relevant: list[bool], k: int | None = None) -> float:
    order = sorted(range(len(similarity)), key=lambda j: (-similarity[j], j))[:k]
    found, total = 0, 0.0
    for rank, j in enumerate(order, 1):
        if relevant[j]:
            found += 1
            total += found / rank
    return total / found if found else 0.0


def naive_curve(similarity: list[float], relevant: list[bool]) -> list[float]:
    order = sorted(range(len(similarity)), key=lambda j: (-similarity[j], j))
    hits = np.cumsum([relevant[j] for j in order])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / hits[-1]
    return [max(p for p, r in zip(precision, recall, strict=True) if r >= level / 100 - 1e-12) for level in range(101)]


def cosine(a: Tensor, b: Tensor) -> np.ndarray:
    a, b = a.double(), b.double()
    return ((a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T).numpy()


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("captions", [(1,), (1, 3, 2)])
def test_map_equals_the_naive_loop_and_scikit_learn(multi: bool, captions: tuple[int, ...]) -> None:
    data = made(captions=captions, multi=multi)
    assert data.labels is not None
    result = evaluate(data, "cosine", map_ks=(1, 7, 50))
    labels = data.labels.numpy()
    text_labels = labels[data.text_owner]
    for name, query, gallery, ql, gl in (
        ("image_to_text", data.image, data.text, labels, text_labels),
        ("text_to_image", data.text, data.image, text_labels, labels),
    ):
        similarity, relevant = cosine(query, gallery), (ql.astype(int) @ gl.T.astype(int)) > 0
        rows = [i for i in range(len(query)) if relevant[i].any()]
        assert result[f"left_out/{name}"] == len(query) - len(rows)
        aps = {i: naive_ap(list(similarity[i]), list(relevant[i])) for i in rows}
        assert result[f"map/{name}"] == pytest.approx(np.mean(list(aps.values())), abs=1e-12)
        sklearn = np.mean([average_precision_score(relevant[i], similarity[i]) for i in rows])
        assert result[f"map/{name}"] == pytest.approx(sklearn, abs=1e-12)
        for k in (1, 7, 50):
            at_k = np.mean([naive_ap(list(similarity[i]), list(relevant[i]), k) for i in rows])
            assert result[f"map{k}/{name}"] == pytest.approx(at_k, abs=1e-12)
        curve = np.mean([naive_curve(list(similarity[i]), list(relevant[i])) for i in rows], axis=0)
        np.testing.assert_allclose(result[f"precision/{name}"], curve, atol=1e-12)
        for c in range(labels.shape[1]):
            members = [aps[i] for i in rows if ql[i, c]]
            assert result[f"map_per_class/{name}"][c] == pytest.approx(np.mean(members), abs=1e-12)
    assert result["map/mean"] == (result["map/image_to_text"] + result["map/text_to_image"]) / 2


@pytest.mark.parametrize("without", [False, True])
def test_all_modal_gallery_with_and_without_the_query(without: bool) -> None:
    data = made(captions=(2, 1))
    assert data.labels is not None
    result = evaluate(data, "cosine")
    both, labels = torch.cat([data.image, data.text]), torch.cat([data.labels, data.labels[data.text_owner]]).numpy()
    similarity, relevant = cosine(both, both), (labels.astype(int) @ labels.T.astype(int)) > 0
    n = len(data.image)
    for name, rows in (("image_to_all", range(n)), ("text_to_all", range(n, len(both)))):
        aps = []
        for i in rows:
            kept = [j for j in range(len(both)) if not (without and j == i)]
            if relevant[i, kept].any():
                aps.append(naive_ap(list(similarity[i, kept]), list(relevant[i, kept])))
        assert result[f"map/{name}" + "_without_query" * without] == pytest.approx(np.mean(aps), abs=1e-12)


def test_chunks_and_duplicates_give_bit_identical_results() -> None:
    data = made(n=60, captions=(1, 2), multi=True)
    # Exact copies at distant places of the gallery, with other labels: any difference in the last bit would show.
    text = torch.cat([data.text, data.text[:25], data.text[:25]])
    owner = torch.cat([data.text_owner, data.text_owner[30:55], data.text_owner[5:30]])
    data = Embeddings(data.image, text, owner, data.labels)
    results = [json.dumps(evaluate(data, "zscore", chunk=chunk)) for chunk in (1, 7, 1000, None)]
    assert results[0] == results[1] == results[2] == results[3]
    image, text = common_space(data, "cosine")
    ranked = top_k(image, text, len(text))
    position = ranked.argsort(dim=1)
    m = len(text) - 50
    for copy in (m, m + 25):
        assert bool((position[:, :25] < position[:, copy : copy + 25]).all())
    assert torch.equal(ranked, top_k(image, text, len(text), chunk=1))


def test_ties_rank_by_position() -> None:
    gallery = torch.tensor([[1.0, 0.0]] * 4)
    labels = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]], dtype=torch.uint8)
    ranking = rank_classes(gallery[:1], gallery, torch.tensor([[1, 0]]), labels, ks=(1, 2))
    assert ranking.ap.tolist() == [(1 / 2 + 2 / 4) / 2]
    assert ranking.ap_at[1].tolist() == [0.0]
    assert ranking.ap_at[2].tolist() == [0.5]
    assert pair_ranks(gallery[:1], gallery, torch.tensor([2]), torch.arange(4)).tolist() == [3]


@pytest.mark.parametrize("long", [1, 10**6], ids=["radix", "stable sort, as on a GPU"])
@pytest.mark.parametrize("groups", [3, 200])
def test_similarities_that_differ_in_their_last_bits_only_are_in_order(
    groups: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the upper 32 bits can tell apart, equal ones among them, and what is left out at the end."""
    monkeypatch.setattr(ranks, "LONG", long)
    g = torch.Generator().manual_seed(groups)
    base = torch.linspace(-0.5, 0.5, groups, dtype=torch.float64).repeat_interleave(4)
    gallery = (base + torch.randint(0, 3, (len(base),), generator=g) * 2.0**-40)[torch.randperm(len(base), generator=g)]
    similarity = (gallery * 2.0**52).round()[None].repeat(5, 1)
    similarity[torch.arange(5), torch.arange(5)] = ranks.LAST
    similarity[:, 5:7] = torch.tensor([1.0, -1.0]).double() * 2**52 * (1 + 2.0**-19)  # as far as lengths are rounded
    relevant = torch.rand(5, len(base), generator=g) < 0.4
    for row, found in enumerate(ranks.relevant_ranks(zip(similarity.split(2), relevant.split(2), strict=True))):
        order = sorted(range(len(base)), key=lambda j: (-similarity[row, j].item(), j))
        assert order[-1] == row
        assert found.tolist() == [rank for rank, j in enumerate(order, 1) if relevant[row, j]]


@pytest.mark.parametrize("long", [1, 10**6], ids=["radix", "stable sort, as on a GPU"])
def test_long_rows_give_the_bits_of_short_ones(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(n=70, captions=(1, 2), multi=True)
    data.text[20:40] = data.text[:20]
    expected = json.dumps(evaluate(data, "cosine"))
    monkeypatch.setattr(ranks, "LONG", long)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 1000)
    assert json.dumps(evaluate(data, "cosine")) == expected


def test_queries_without_a_relevant_item_are_left_out_and_counted() -> None:
    data = made(n=20, classes=4)
    assert data.labels is not None
    labels = data.labels.clone()
    labels[3] = labels[8] = False
    result = evaluate(Embeddings(data.image, data.text, data.text_owner, labels), "cosine")
    assert result["left_out/image_to_text"] == result["left_out/text_to_image"] == 2
    kept = torch.tensor([i for i in range(20) if i not in (3, 8)])
    relevant = (labels.int() @ labels.int()[data.text_owner].T > 0).numpy()
    similarity = cosine(data.image, data.text)
    expected = np.mean([naive_ap(list(similarity[i]), list(relevant[i])) for i in kept.tolist()])
    assert result["map/image_to_text"] == pytest.approx(expected, abs=1e-12)
    nothing = evaluate(Embeddings(data.image, data.text, data.text_owner, torch.zeros(20, 4)), "cosine")
    assert nothing["map/mean"] is None
    assert nothing["map_per_class/image_to_text"] == [None] * 4
    assert nothing["left_out/image_to_all"] == 20
    json.dumps(nothing, allow_nan=False)


def test_recall_with_uneven_captions_equals_the_naive_loop() -> None:
    data = made(n=30, captions=(3, 0, 1))
    result = evaluate(Embeddings(data.image, data.text, data.text_owner), "cosine")
    similarity, owner = cosine(data.image, data.text), data.text_owner.tolist()
    ranks: dict[str, list[int]] = {"image_to_text": [], "text_to_image": []}
    for i in range(30):
        order = sorted(range(len(owner)), key=lambda j: (-similarity[i, j], j))
        if i in owner:
            ranks["image_to_text"].append(1 + min(order.index(j) for j in range(len(owner)) if owner[j] == i))
    for j, i in enumerate(owner):
        ranks["text_to_image"].append(1 + sorted(range(30), key=lambda x: (-similarity[x, j], x)).index(i))
    for name, values in ranks.items():
        for k in (1, 5, 10):
            assert result[f"recall/{name}@{k}"] == np.mean([v <= k for v in values])
        assert result[f"median_rank/{name}"] == np.median(values)
    assert not [key for key in result if key.startswith("map")]


def test_pair_recall_is_there_with_labels_too() -> None:
    data = made()
    with_labels = evaluate(data, "cosine")
    without = evaluate(Embeddings(data.image, data.text, data.text_owner), "cosine")
    assert without.items() <= with_labels.items()


def test_zscore_makes_constant_dimensions_zero() -> None:
    x = torch.tensor([[1.0, 0.1, 5.0], [3.0, 0.1, 5.5], [5.0, 0.1, 6.5]])
    z = zscore(x)
    assert z[:, 1].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(z[:, [0, 2]].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(z[:, [0, 2]].std(0, correction=0), 1, atol=1e-12)
    data = Embeddings(torch.ones(4, 3), torch.ones(4, 3), torch.arange(4))
    assert evaluate(data, "cosine")["median_rank/image_to_text"] == 2.5


def test_zscore_is_a_choice() -> None:
    data = made()
    shifted = Embeddings(data.image + 3, 7 * data.text - 5, data.text_owner, data.labels)
    assert evaluate(shifted, "zscore")["map/mean"] == pytest.approx(evaluate(data, "zscore")["map/mean"], abs=1e-9)
    assert abs(evaluate(shifted, "cosine")["map/mean"] - evaluate(data, "cosine")["map/mean"]) > 0.01


def test_wrong_input_is_named() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(BadInput, match="NaN"):
        Embeddings(x, x / 0, torch.arange(3))
    with pytest.raises(BadInput, match="text_owner"):
        Embeddings(x, x, torch.tensor([0, 1, 3]))
    with pytest.raises(BadInput, match="labels have shape"):
        Embeddings(x, x, torch.arange(3), torch.zeros(2, 4))
    with pytest.raises(BadInput, match="image has 2 dimensions, text 1"):
        evaluate(Embeddings(x, x[:, :1], torch.arange(3)))


MEMORY = """
import resource, torch
from cmgan_dist.retrieval.metrics import Embeddings, common_space, pair_ranks, rank_classes
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
n = 20_000
data = Embeddings(torch.randn(n, 8), torch.randn(n, 8), torch.arange(n), torch.eye(10)[torch.arange(n) % 10].bool())
image, text = common_space(data, "cosine")
rank_classes(image[:8], text, data.labels[:8], data.labels)
before = peak()
pair_ranks(image[:4000], text, torch.arange(4000), data.text_owner)
rank_classes(image[:200], text, data.labels[:200], data.labels)
print(peak() - before)
"""


@pytest.mark.process
def test_twenty_thousand_items_need_no_square_matrix() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    # The 4,000 x 20,000 similarities asked for would take 610 MiB at once.
    assert float(done.stdout) < 320


def test_chunks_hold_a_bounded_number_of_similarities() -> None:
    sizes = [part.numel() for _, part in metrics.similarities(torch.randn(3000, 2), torch.randn(9000, 2))]
    assert sum(sizes) == 3000 * 9000
    assert max(sizes) <= metrics.CHUNK_ELEMENTS


def test_validation_maximises_map_or_without_labels_recall() -> None:
    labelled = {"map/image_to_text": 0.5, "map/text_to_image": 0.7, "recall/image_to_text@1": 0.0}
    assert direction_scores(labelled) == {"image_to_text": 0.5, "text_to_image": 0.7}
    assert score_of(labelled) == pytest.approx(0.6)
    pairs = {f"recall/{d}@{k}": v for d, v in (("image_to_text", 0.2), ("text_to_image", 0.4)) for k in (1, 5, 10)}
    assert score_of(pairs) == pytest.approx(0.3)
    with pytest.raises(BadInput, match="no image and text share a class"):
        score_of({"map/image_to_text": None, "map/text_to_image": None})


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_stored_unit_vectors_keep_their_bits(dim: int) -> None:
    x = torch.randn(5000, dim, generator=torch.Generator().manual_seed(dim)) * 7
    x[3] = 0
    once = unit_vectors(x)
    assert once.dtype == torch.float32
    assert torch.equal(unit_vectors(once), once)
    torch.testing.assert_close(once, l2_normalise(x).float(), rtol=0, atol=0)
    assert torch.equal(once[3], torch.zeros(dim))
