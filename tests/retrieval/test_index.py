"""The index: exact against a naive loop, IVF against exact, changes in one step, refusals by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval import index_files, nearest
from cmgan_dist.retrieval.embeddings import EmbeddingSet
from cmgan_dist.retrieval.index import Hit, Index
from cmgan_dist.retrieval.nearest import Nearest
from tests.retrieval.embeddings_cases import Made, clustered, make_embeddings


def naive(made: Made, query: np.ndarray, k: int, fits: list[int]) -> list[tuple[int, float]]:
    """(id, cosine) by a loop in Python floats."""
    unit = query.astype(np.float64) / max(1, np.linalg.norm(query.astype(np.float64)))
    scored = [(-sum(a * b for a, b in zip(unit.tolist(), made.vectors[i].tolist(), strict=True)), i) for i in fits]
    return [(i, -score) for score, i in sorted(scored)[:k]]


def ids_of(hits: list[Hit]) -> list[int]:
    return [hit.id for hit in hits]


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
@pytest.mark.parametrize("shards", [[(1, 0)], [(0, 1)], [(3, 2)], [(7, 11), (1, 0), (0, 5), (5, 5)]])
def test_odd_sizes_against_a_naive_loop(kind: str, shards: list[tuple[int, int]], tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", shards)
    index = Index.build(tmp_path / "emb", tmp_path / "index", kind=kind)
    total = len(made.rows)
    assert (len(index), index.dim, index.manifest.kind) == (total, 16, kind)
    queries = clustered(np.random.default_rng(5), 3, 16, 3, 1.0) * np.asarray([[1], [0.1], [7]], np.float32)
    images = [i for i in range(total) if made.rows[i]["modality"] == "image"]
    boats = [i for i in range(total) if made.rows[i]["labels"] == [1]]
    everything = list(range(total))
    for k in (1, total, total + 5):
        for options, fits in (({}, everything), ({"modality": "image"}, images), ({"classes": ["boat"]}, boats)):
            for query, hits in zip(queries, index.search(queries, k, **options), strict=True):
                expected = naive(made, query, k, fits)
                assert len(hits) == min(k, len(fits))
                scores = [score for _, score in expected]
                np.testing.assert_allclose([h.score for h in hits], scores, atol=1e-6 if kind == "exact" else 0.02)
                if kind == "exact":
                    assert ids_of(hits) == [i for i, _ in expected]
                assert set(ids_of(hits)) <= set(fits)


def test_hits_are_the_items(tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", [(4, 9), (0, 3)])
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    for item, row in enumerate(made.rows):
        hit = index.search(made.vectors[item], 1)[0][0]
        labels = tuple(("animal", "boat", "car")[i] for i in row["labels"])  # type: ignore[attr-defined]
        own = [r["caption"] for r in made.rows if r["modality"] == "text" and r["owner"] == item >= 0]
        texts = tuple(own) if row["modality"] == "image" else (row["caption"],)
        assert hit == Hit(**{**row, "labels": labels, "score": hit.score, "texts": texts})  # type: ignore[arg-type]
        assert hit.score == pytest.approx(1, abs=1e-6)
        assert index.get(item).key == row["key"]
        assert np.array_equal(index.vector(item), made.vectors[item])
    assert index.manifest.embeddings[0]["first_id"] == 0
    assert index.source == index.source_of(3) == {"kind": "shards", "location": "/data/emb", "sha256": ""}


def test_the_same_vectors_are_not_added_twice_from_anywhere(tmp_path: Path) -> None:
    make_embeddings(tmp_path / "emb", [(4, 4)])
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    shutil.copytree(tmp_path / "emb", tmp_path / "copy")
    for name in ("emb", "copy"):
        with pytest.raises(BadInput, match="is in the index already"):
            index.add(tmp_path / name)
    make_embeddings(tmp_path / "more", [(4, 4)], seed=1)
    assert index.add(tmp_path / "more") == 8


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    make_embeddings(tmp_path / "emb", [(4, 4)])
    Index.build(tmp_path / "emb", tmp_path / "index")
    for path in (tmp_path / "index" / "index.json", tmp_path / "emb" / "embeddings.json"):
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for at in rng.integers(len(whole), size=200):
            data = bytearray(whole)
            data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            if parse(data) == parse(whole):  # white space
                continue
            with pytest.raises(BadInput, match=re.escape(path.name)):
                Index.open(tmp_path / "index") if path.name == "index.json" else EmbeddingSet.open(tmp_path / "emb")
        path.write_bytes(whole)


def parse(data: bytes) -> object:
    """What a JSON file holds, None where it holds none."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_texts_of_a_removed_image_have_no_image_any_more(tmp_path: Path) -> None:
    make_embeddings(tmp_path / "emb", [(3, 6)])
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    assert index.get(1).texts == ("caption 4", "caption 7")
    assert index.remove([1, 7]) == 2
    assert [index.get(item).owner for item in (0, 2, 3, 4, 5, 6, 8)] == [0, 2, 0, -1, 2, 0, 2]
    assert index.get(0).texts == ("caption 3", "caption 6")


def test_a_search_goes_on_while_the_index_is_changed(tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", [(60, 60)])
    index, failed = Index.build(tmp_path / "emb", tmp_path / "index"), []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                index.search(made.vectors[:3], 20)
            except BadInput as error:
                failed.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for item in range(20):
        index.remove([item])
    ended.set()
    for thread in threads:
        thread.join()
    assert failed == []


def test_near_is_what_nine_in_ten_items_find(tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", [(30, 60)])
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    images, texts = made.vectors[:30], made.vectors[30:]
    scores = images @ texts.T
    scores[np.arange(60) % 30, np.arange(60)] = -2  # its own texts
    assert index.near == pytest.approx(np.quantile([*scores.max(1), *scores.max(0)], 0.1), abs=1e-6)
    make_embeddings(tmp_path / "alone", [(5, 0)])
    alone = Index.build(tmp_path / "alone", tmp_path / "other")
    own = np.asarray(alone.vectors.take(np.arange(5)))
    scores = own @ own.T - 3 * np.eye(5)
    assert alone.near == pytest.approx(np.quantile(scores.max(1), 0.1), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda index: index.search(np.zeros((1, 16)), k=1.5), "k is 1.5: it must be a whole number"),
        (lambda index: index.search(np.zeros((1, 16)), k=None), "k is None"),
        (lambda index: index.search("a red heart"), "the query is no array of numbers"),
        (lambda index: index.search([[1.0], [1.0, 2.0]]), "the query is no array of numbers"),
        (lambda index: index.search(np.zeros((1, 16), complex)), "the query is no array of numbers"),
        (lambda index: index.search(np.zeros((1, 16)), classes=[1]), r"classes are \[1\]: give a list of names"),
        (lambda index: index.search(np.zeros((1, 16)), classes=5), "classes are 5: give a list of names"),
        (lambda index: index.remove(5), "items are 5: give a list of ids or keys"),
        (lambda index: index.remove(None), "items are None: give a list of ids or keys"),
        (lambda index: Index.open(""), "index is empty: give a path"),
        (lambda index: Index.build(index.folder, ""), "output is empty: give a path"),
        (lambda index: Index.build("", index.folder), "embeddings is empty: give a path"),
        (lambda index: index.search(np.zeros((1, 16)), classes="boat"), "classes are 'boat'"),
        (lambda index: index.search(np.zeros((1, 16)), modality=["image"]), r"modality is \['image'\]"),
        (lambda index: index.get(None), "item None is no id"),
        (lambda index: index.vector([1, 2]), r"item \[1, 2\] is no id"),
        (lambda index: index.remove("12"), "items are '12': give a list"),
        (lambda index: index.remove(["\ud800"]), "no item of the index"),
        (lambda index: index.remove([None]), "item None is no id"),
        (lambda index: index.add("a\0b"), "a.*b"),
        (lambda index: Index.open("a\0b"), "holds characters that no path can"),
        (lambda index: Index.open(None), "index is None: give a path"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_a_wrong_kind_are_one_sentence(call: Callable[[Index], object], said: str, tmp_path: Path) -> None:
    make_embeddings(tmp_path / "emb", [(4, 4)])
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    with pytest.raises(BadInput, match=said):
        call(index)
    assert index.search(np.zeros((0, 16))) == []


def test_half_precision_vectors_are_no_longer_than_1(tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", [(20, 20)], dtype="float16")
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    found = np.stack([index.vector(i) for i in range(40)])
    assert np.linalg.norm(found, axis=1).max() < 1 + 1e-6
    np.testing.assert_allclose(found, made.vectors, atol=1e-3)


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
def test_short_vectors_rank_by_the_inner_product(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = clustered(rng, 40, 16, 4, 0.4) * rng.uniform(0.1, 1, (40, 1)).astype(np.float32)
    make_embeddings(tmp_path / "emb", [(20, 20)], vectors=plain)
    index = Index.build(tmp_path / "emb", tmp_path / "index", kind=kind)
    stored = np.stack([index.vector(i) for i in range(40)])
    np.testing.assert_allclose(stored, plain, atol=0 if kind == "exact" else 0.01)
    for query in plain[:5]:
        hits = index.search(query, 40)[0]
        scores = plain.astype(np.float64) @ query
        if kind == "exact":
            assert [hit.id for hit in hits] == np.argsort(-scores, kind="stable").tolist()
        np.testing.assert_allclose([hit.score for hit in hits], scores[[hit.id for hit in hits]], atol=0.02)


@pytest.mark.parametrize(("length", "said"), [(0.0, "0"), (1.5, "1.5"), (np.nan, "nan")])
def test_vectors_of_no_length_are_refused(length: float, said: str, tmp_path: Path) -> None:
    plain = clustered(np.random.default_rng(0), 40, 16, 4, 0.4)
    plain[23] *= np.float32(length)
    make_embeddings(tmp_path / "emb", [(20, 20)], vectors=plain)
    with pytest.raises(
        BadInput, match=f"text vector 3 of train-000000 has length {said}, expected 1 or less, but not 0"
    ):
        Index.build(tmp_path / "emb", tmp_path / "other")


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_hits_do_not_depend_on_the_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a few vectors, so that most scores tie, and a query that is searched alone."""
    rng = np.random.default_rng(0)
    vectors = clustered(rng, 7, 33, 7, 0.3)[rng.integers(7, size=200)]
    queries = clustered(rng, 5, 33, 7, 0.3)
    monkeypatch.setattr(nearest, "BLOCK_ROWS", rows)
    together = Nearest(queries, 60)
    together.push(vectors, np.arange(200))
    for row, (scores, ids) in enumerate(together.found()):
        alone = Nearest(queries[row : row + 1], 60)
        alone.push(vectors[::-1], np.arange(200)[::-1])
        assert np.array_equal(alone.found()[0][1], ids)
        exact = vectors.astype(np.float64) @ queries[row].astype(np.float64)
        _, group = np.unique(exact.round(9), return_inverse=True)
        assert np.array_equal(np.lexsort((np.arange(200), -group))[:60], ids)
        assert np.array_equal(alone.found()[0][0], scores)


# ---------------------------------------------------------------------------------------------- IVF


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path, Path]:
    """3,000 clustered vectors, images and texts in the same clusters: embeddings, exact index, IVF index."""
    folder = tmp_path_factory.mktemp("large")
    made = make_embeddings(folder / "emb", [(500, 500)] * 3, dim=32)
    Index.build(folder / "emb", folder / "exact", kind="exact")
    Index.build(folder / "emb", folder / "ivf", kind="ivf_sq8")
    return made, folder / "exact", folder / "ivf"


@pytest.mark.parametrize("modality", [None, "image", "text"])
def test_ivf_finds_what_exact_search_finds(modality: str | None, large: tuple[Made, Path, Path]) -> None:
    made, exact, ivf = large
    index = Index.open(ivf)
    assert 0.95 < index.manifest.recall <= 1
    assert index.manifest.nprobe < index.vectors.index.nlist  # type: ignore[union-attr]
    queries = made.vectors[7::50] + 0.05 * np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    found = index.search(queries, 10, modality=modality)
    expected = Index.open(exact).search(queries, 10, modality=modality)
    shares = [len(set(ids_of(a)) & set(ids_of(b))) / 10 for a, b in zip(found, expected, strict=True)]
    assert np.mean(shares) > 0.93
    unit = queries / np.maximum(1, np.linalg.norm(queries, axis=1, keepdims=True))
    for query, hits in zip(unit, found, strict=True):
        np.testing.assert_allclose([h.score for h in hits], made.vectors[ids_of(hits)] @ query, atol=0.02)
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
        assert {h.modality for h in hits} <= {modality or h.modality for h in hits}


def test_a_filter_always_gives_k(tmp_path: Path) -> None:
    """The texts are in one far corner, which a query from elsewhere visits last."""
    corner = np.tile(-np.eye(32, dtype=np.float32)[:1], (20, 1))
    images = clustered(np.random.default_rng(1), 2980, 32, 60, 0.2)
    images[:, 0] = np.abs(images[:, 0])
    make_embeddings(tmp_path / "emb", [(2980, 20)], dim=32, vectors=np.concatenate([images, corner]))
    index = Index.build(tmp_path / "emb", tmp_path / "index", kind="ivf_sq8")
    index.vectors.nprobe = 1  # type: ignore[union-attr]
    for k, texts, boats in ((5, 5, 5), (20, 20, 7), (1000, 20, 7)):
        assert [len(hits) for hits in index.search(images[:9], k, modality="text")] == [texts] * 9
        assert [len(hits) for hits in index.search(images[:9], k, modality="text", classes=["boat"])] == [boats] * 9
        assert [len(hits) for hits in index.search(images[:9], k)] == [k] * 9
    index.remove(list(range(2985, 3000)))
    assert [ids_of(hits) for hits in index.search(images[:2], 10, modality="text")] == [
        [2980, 2981, 2982, 2983, 2984]
    ] * 2
    index.remove(list(range(2980, 2985)))
    assert index.search(images[:2], 10, modality="text") == [[], []]


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
def test_what_is_removed_is_gone(kind: str, tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", [(300, 300)], dim=32)
    index = Index.build(tmp_path / "emb", tmp_path / "index", kind=kind)
    name = index_files.VECTORS_NAMES[kind]
    size = (tmp_path / "index" / name).stat().st_size
    assert index.remove(["train0-7", "train0-11"]) == 4
    assert index.remove([20, 21]) == 2
    gone = {7, 11, 307, 311, 20, 21}
    opened = Index.open(tmp_path / "index", verify=True)
    for each in (index, opened):
        assert len(each) == 594
        found = {i for hits in each.search(made.vectors[sorted(gone)], 600) for i in ids_of(hits)}
        assert found == set(range(600)) - gone
        for item in (6, 320, 599):
            np.testing.assert_allclose(each.vector(item), made.vectors[item], atol=0.02)
            assert each.get(item).key == made.rows[item]["key"]
        with pytest.raises(BadInput, match="item 7 is not in the index"):
            each.get(7)
    assert (tmp_path / "index" / name).stat().st_size < size
    assert not list((tmp_path / "index").glob("*.new"))
    with pytest.raises(BadInput, match="has the key 'train0-7'"):
        index.remove(["train0-8", "train0-7"])
    assert len(Index.open(tmp_path / "index")) == 594


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
def test_embeddings_are_added(kind: str, tmp_path: Path) -> None:
    vectors = clustered(np.random.default_rng(0), 1290, 32, 20, 0.4)
    first = make_embeddings(tmp_path / "a", [(600, 600)], vectors=vectors[:1200])
    more = make_embeddings(tmp_path / "b", [(60, 30)], classes=("car", "dog"), vectors=vectors[1200:], prefix="more")
    index = Index.build(tmp_path / "a", tmp_path / "index", kind=kind)
    index.remove([1199])
    assert index.add(tmp_path / "b") == 90
    assert (len(index), index.classes, index.manifest.next_id) == (1289, ["animal", "boat", "car", "dog"], 1290)
    assert index.manifest.attribution == "by a\nby b"
    for item, row in enumerate(more.rows):
        hit = index.get(1200 + item)
        assert (hit.key, hit.caption, hit.labels) == (row["key"], row["caption"], (("car", "dog")[row["labels"][0]],))  # type: ignore[index]
        assert hit.owner == 1200 + int(str(row["owner"]))
        np.testing.assert_allclose(index.vector(1200 + item), more.vectors[item], atol=0.03)
    assert index.source_of(1200) == {"kind": "shards", "location": "/data/b", "sha256": ""}
    assert index.source_of(1198) == {"kind": "shards", "location": "/data/a", "sha256": ""}
    (hits,) = index.search(more.vectors[4], 1289, classes=["car"])
    cars = [i for i, row in enumerate(first.rows) if row["labels"] == [2] and i != 1199]
    assert set(ids_of(hits)) == {*cars, *(1200 + i for i, row in enumerate(more.rows) if row["labels"] == [0])}
    with pytest.raises(BadInput, match="b is in the index already"):
        index.add(tmp_path / "b")
    make_embeddings(tmp_path / "c", [(5, 5)], dim=32, model="cd" * 32, run="runs/other")
    with pytest.raises(BadInput, match=r"c was made with another model \(runs/other\) than the index \(runs/nowhere\)"):
        index.add(tmp_path / "c")
    assert len(Index.open(tmp_path / "index")) == 1289


def test_vectors_that_bytes_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Ranges of the bytes come from tight clusters: what lies elsewhere would be moved."""
    make_embeddings(tmp_path / "a", [(200, 200)], vectors=clustered(np.random.default_rng(0), 400, 32, 5, 0.05))
    make_embeddings(tmp_path / "b", [(100, 0)], vectors=clustered(np.random.default_rng(1), 100, 32, 50, 1.0))
    index = Index.build(tmp_path / "a", tmp_path / "index", kind="ivf_sq8")
    with pytest.raises(BadInput, match="b: 100% of its vectors lie outside of what the index was built on"):
        index.add(tmp_path / "b")
    assert len(Index.open(tmp_path / "index", verify=True)) == 400
    exact = Index.build(tmp_path / "a", tmp_path / "exact", kind="exact")
    assert exact.add(tmp_path / "b") == 100


@pytest.mark.parametrize("shards", [[(300, 600)], [(300, 0)], [(1, 1)], [(1, 0)]])
def test_chance_is_that_of_pairs_that_do_not_belong_together(shards: list[tuple[int, int]], tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "emb", shards)
    index = Index.build(tmp_path / "emb", tmp_path / "index")
    images, texts = shards[0]
    first, second = range(images), range(images, images + texts) if texts else range(images)
    scores = [
        made.vectors[i].astype(np.float64) @ made.vectors[j]
        for i in first
        for j in second
        if made.rows[i]["owner"] != made.rows[j]["owner"]
    ]
    expected = (np.mean(scores), np.std(scores)) if scores else (0, 16**-0.5)
    np.testing.assert_allclose(index.chance, expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
@pytest.mark.parametrize("step", range(5))
def test_a_change_that_is_killed_leaves_one_whole_index(
    step: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """index.json is replaced first, then the files get their names: the process dies at the step-th of these."""
    vectors = clustered(np.random.default_rng(0), 650, 16, 10, 0.4)
    make_embeddings(tmp_path / "a", [(300, 300)], vectors=vectors[:600])
    make_embeddings(tmp_path / "b", [(30, 20)], vectors=vectors[600:])
    index = Index.build(tmp_path / "a", tmp_path / "index", kind=kind)
    replace, calls = os.replace, iter(range(100))

    def dying(source: object, target: object) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        index.add(tmp_path / "b")
    monkeypatch.undo()
    added = step > 2  # two renames of what is there, then index.json
    vectors = vectors[: 650 if added else 600]
    check(Index.open(tmp_path / "index", verify=True), vectors)
    # the next change writes NAME.new anew, which index.json may still mean
    monkeypatch.setattr("cmgan_dist.retrieval.index.commit", lambda *_: replace(tmp_path, tmp_path / "nowhere" / "x"))
    with pytest.raises(BadInput, match="cannot be written"):
        index.remove([3])
    monkeypatch.undo()
    check(Index.open(tmp_path / "index", verify=True), vectors)
    assert index.remove([3]) == 1
    assert len(Index.open(tmp_path / "index", verify=True)) == len(vectors) - 1


def check(index: Index, vectors: np.ndarray) -> None:
    """Compare an index with the vectors it was made of."""
    assert len(index) == len(vectors)
    for item in (0, 150, len(vectors) - 1):
        np.testing.assert_allclose(index.vector(item), vectors[item], atol=0.03)
        assert index.get(item).id == item


def test_nothing_is_seen_before_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_embeddings(tmp_path / "a", [(10, 10)])
    make_embeddings(tmp_path / "b", [(3, 2)], seed=1)
    index = Index.build(tmp_path / "a", tmp_path / "index")
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cmgan_dist.retrieval.index.write_items", full)
    with pytest.raises(BadInput, match=r"index .* cannot be written \(No space left on device\)"):
        index.add(tmp_path / "b")
    assert len(Index.open(tmp_path / "index", verify=True)) == 20
    assert {name: (tmp_path / "index" / name).read_bytes() for name in before} == before


def test_one_process_changes_it_at_a_time(tmp_path: Path) -> None:
    make_embeddings(tmp_path / "a", [(10, 10)])
    index = Index.build(tmp_path / "a", tmp_path / "index")
    with index_files.changing(tmp_path / "index"), pytest.raises(BadInput, match="is in use by process"):
        index.remove([0])
    assert index.remove([0]) == 1


def test_another_kind_takes_the_place(tmp_path: Path) -> None:
    make_embeddings(tmp_path / "a", [(50, 50)])
    for kind, name in (("ivf_sq8", "vectors.faiss"), ("exact", "vectors.npy")):
        Index.build(tmp_path / "a", tmp_path / "index", kind=kind)
        assert {p.name for p in (tmp_path / "index").iterdir()} == {"index.json", "items.parquet", name}


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "foreign", "flip"])
@pytest.mark.parametrize("which", ["vectors", "items"])
def test_a_damaged_file_is_named(which: str, damage: str, kind: str, tmp_path: Path) -> None:
    make_embeddings(tmp_path / "a", [(50, 50)])
    make_embeddings(tmp_path / "b", [(50, 50)], seed=1, prefix="other")
    for name in ("a", "b"):
        Index.build(tmp_path / name, tmp_path / f"index-{name}", kind=kind)
    name = index_files.VECTORS_NAMES[kind] if which == "vectors" else "items.parquet"
    path = tmp_path / "index-a" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        shutil.copy(tmp_path / "index-b" / name, path)
    elif damage == "flip":
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    with pytest.raises(BadInput, match=name):
        Index.open(tmp_path / "index-a")


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
def test_large_files_are_compared_in_pieces_and_whole_when_asked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "SMALL", 1 << 10)
    monkeypatch.setattr(index_files, "PIECE", 1 << 5)
    for name, seed in (("a", 0), ("b", 1)):
        make_embeddings(tmp_path / name, [(500, 500)], seed=seed)
        Index.build(tmp_path / name, tmp_path / f"index-{name}", kind=kind)
    path = tmp_path / "index-a" / index_files.VECTORS_NAMES[kind]
    content = bytearray(path.read_bytes())
    spot = 20 * (len(content) - 32) // 63 + 100  # between two pieces
    content[spot] ^= 0x10
    path.write_bytes(content)
    Index.open(tmp_path / "index-a")
    with pytest.raises(BadInput, match=rf"{path.name} is damaged or of another index \(has another checksum\)"):
        Index.open(tmp_path / "index-a", verify=True)
    shutil.copy(tmp_path / "index-b" / path.name, path)
    with pytest.raises(BadInput, match=rf"{path.name} is damaged or of another index"):
        Index.open(tmp_path / "index-a")


def test_another_version_and_no_index_are_said(tmp_path: Path) -> None:
    make_embeddings(tmp_path / "a", [(5, 5)])
    Index.build(tmp_path / "a", tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"version": 9}))
    with pytest.raises(BadInput, match=r"index\.json has version 9, this program reads 1"):
        Index.open(tmp_path / "index")
    path.write_text("{")
    with pytest.raises(BadInput, match=r"index\.json cannot be read"):
        Index.open(tmp_path / "index")
    with pytest.raises(BadInput, match=r"index\.json does not exist: make the index by launchers/index\.py"):
        Index.open(tmp_path / "nowhere")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    made = make_embeddings(tmp_path / "a", [(5, 5)])
    index = Index.build(tmp_path / "a", tmp_path / "index")
    query = made.vectors[0]
    with pytest.raises(BadInput, match=r"query has shape \[3\], the index vectors of 16 numbers"):
        index.search(query[:3])
    with pytest.raises(BadInput, match="query holds NaN"):
        index.search(query * np.float32("nan"))
    with pytest.raises(BadInput, match="k is 0"):
        index.search(query, 0)
    with pytest.raises(BadInput, match="modality is 'picture': it must be image or text"):
        index.search(query, modality="picture")
    with pytest.raises(BadInput, match="has no class 'boot': did you mean 'boat'"):
        index.search(query, classes=["boot"])
    with pytest.raises(BadInput, match="nothing would be left"):
        index.remove(list(range(10)))
    with pytest.raises(BadInput, match="kind is 'flat'"):
        Index.build(tmp_path / "a", tmp_path / "other", kind="flat")
    make_embeddings(tmp_path / "none", [(0, 0)])
    with pytest.raises(BadInput, match="none holds no vectors"):
        Index.build(tmp_path / "none", tmp_path / "other")
    bad = clustered(np.random.default_rng(0), 10, 16, 2, 0.1)
    for name, value in (("long", 2.0), ("nan", np.nan), ("inf", np.inf)):
        spoilt = bad.copy()
        spoilt[7] *= np.float32(value)
        make_embeddings(tmp_path / name, [(5, 5)], vectors=spoilt)
        with pytest.raises(BadInput, match=r"text vector 2 of train-000000 has length .*, expected 1"):
            Index.build(tmp_path / name, tmp_path / "other")
    assert len(Index.open(tmp_path / "index")) == 10
