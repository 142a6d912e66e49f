"""The stream on real shard files: the same rows for any ranks and workers, resume, bad samples, edge cases, memory."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmgan_dist.config.fields import Config, StreamConfig
from cmgan_dist.config.load import validate
from cmgan_dist.data.batch import Batch, join
from cmgan_dist.data.index import ShardIndex, index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.order import MixturePlan, Plan
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import Sample
from cmgan_dist.data.stream import Stream
from cmgan_dist.errors import BadInput, BadSample
from tests.services import forked
from tests.toy import environment, index_tar, jpeg, make_features, npy, write_manifest, write_tar

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
"""Side of decoded pictures."""
Row = tuple[str, bytes, object, bytes]
"""Key, image, text and labels of a row, to be compared."""
Drawn = list[tuple[list[Row], list[str]]]
"""Per global batch: its rows and the lines about bad samples."""


def make_pictures(
    folder: Path, counts: list[int], *, faults: dict[tuple[int, int], str] | None = None, one_class: bool = False
) -> Path:
    """Shards of JPEGs with one to three captions. `faults`: (shard, index) -> image, text, label."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    infos = []
    for shard, count in enumerate(counts):
        members = []
        for i in range(count):
            key, fault = f"{shard}-{i:03d}", (faults or {}).get((shard, i))
            texts = [f"caption {c} of {key}" for c in range(1 + (shard + i) % 3)]
            record: dict[str, object] = {"texts": texts, "label": 0 if one_class else (shard + i) % 4}
            picture = jpeg(rng, 32, 40)
            if fault == "image":
                picture = picture[:150]
            elif fault == "text":
                del record["texts"]
            elif fault == "label":
                record["label"] = 9
            members += [(f"{key}.jpg", picture), (f"{key}.json", json.dumps(record).encode())]
        write_tar(folder / f"train-{shard:06d}.tar", members)
        infos.append(index_tar(folder / f"train-{shard:06d}.tar"))
    write_manifest(folder, {"train": infos}, label_kind="single", classes=["a", "b", "c", "d"])
    return folder


def keys_of(counts: list[int]) -> set[str]:
    return {f"{shard}-{i:03d}" for shard, count in enumerate(counts) for i in range(count)}


def open_stream(data: Path | str, config: StreamConfig, rank: int = 0, world: int = 1, seed: int = 5) -> Stream:
    return Stream(str(data), config, seed=seed, image_size=SIZE, rank=rank, world=world)


def rows_of(batch: Batch) -> list[Row]:
    texts: list[object] = (
        list(batch.text) if isinstance(batch.text, list) else [bytes(t.numpy().tobytes()) for t in batch.text]
    )
    assert batch.labels is None or batch.labels.dtype == torch.bool
    labels = [b""] * len(batch.keys) if batch.labels is None else [one.numpy().tobytes() for one in batch.labels]
    images = [one.numpy().tobytes() for one in batch.image]
    return list(zip(batch.keys, images, texts, labels, strict=True))


def draw(data: Path | str, config: StreamConfig, *, world: int = 1, first: int = 0, steps: int, seed: int = 5) -> Drawn:
    """`steps` global batches from batch `first` on: those of all ranks joined, right rows before wrong rows."""
    parts = []
    for rank in range(world):
        stream = open_stream(data, config, rank, world, seed)
        assert stream.workers == config.workers, "the case does not use the workers that it names"
        parts.append(list(islice(stream.batches(first * config.global_batch), steps)))
        for reader in stream.readers:
            reader.close()
    drawn = []
    for batches in zip(*parts, strict=True):
        assert len({b.size for b in batches}) == 1, "ranks have batches of different sizes"
        assert sum(b.size for b in batches) == config.global_batch
        rows = [rows_of(b) for b in batches]
        right = [row for rank, b in enumerate(batches) for row in rows[rank][: b.size]]
        wrong = [row for rank, b in enumerate(batches) for row in rows[rank][b.size :]]
        drawn.append((right + wrong, [line for b in batches for line in b.bad]))
    return drawn


def keys(drawn: Drawn) -> list[str]:
    return [row[0] for rows, _ in drawn for row in rows]


def one_sentence(error: pytest.ExceptionInfo[BadInput], *words: str) -> None:
    """The message is one clear sentence that holds `words`; no traceback of a worker, no second line."""
    text = str(error.value)
    assert "\n" not in text, text
    assert "Traceback" not in text
    for word in words:
        assert word in text, f"'{word}' is not in: {text}"


# ---------------------------------------------------------------------------------------------- same for all


@dataclass
class Case:
    data: Path | str
    config: StreamConfig
    reference: Drawn
    """One process without workers, from position 0."""


COUNTS = [31, 1, 20, 14, 17]  # 83 samples: two batches of 32 an epoch, 19 left out
BATCHES = 8  # four epochs


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("streams")
    config = StreamConfig(global_batch=32, logical_streams=16, window=2)
    pictures = make_pictures(folder / "pictures", COUNTS)
    features = make_features(folder / "features", splits={"train": COUNTS}, captions=3, label_kind="multi", dims=(4, 3))
    single = make_features(folder / "single", splits={"train": COUNTS}, captions=3, dims=(4, 3))
    other = make_features(folder / "other", splits={"train": [9, 30]}, label_kind="multi", dims=(4, 3), seed=8)
    plain = make_features(folder / "plain", splits={"train": COUNTS}, label_kind="none", dims=(4, 3))
    found: dict[str, tuple[Path | str, StreamConfig]] = {
        "pictures": (pictures, config),
        "pictures balanced": (pictures, replace(config, sampling="balanced")),
        "features": (features, config),
        "features balanced": (single, replace(config, sampling="balanced")),
        "no labels": (plain, config),
        "mixture": (f"{features}\n{other}", replace(config, weights=(3.0, 1.0))),
    }
    return {kind: Case(data, c, draw(data, c, steps=BATCHES)) for kind, (data, c) in found.items()}


GRID = [("pictures", world, workers) for world in (1, 2, 4) for workers in (0, 1, 2, 4) if (world, workers) != (1, 0)]
GRID += [("pictures balanced", world, workers) for world, workers in ((1, 4), (2, 2), (4, 0), (4, 1))]
GRID += [("features", 4, 2), ("features balanced", 2, 4), ("no labels", 4, 0), ("no labels", 2, 1)]
GRID += [("mixture", 4, 0), ("mixture", 2, 2)]


@pytest.mark.parametrize(("kind", "world", "workers"), GRID)
def test_the_same_rows_for_any_ranks_and_workers_from_any_position(
    cases: dict[str, Case], kind: str, world: int, workers: int
) -> None:
    """Keys, augmented pictures, chosen captions and labels, batch by batch, from the start and from anywhere."""
    case = cases[kind]
    config = replace(case.config, workers=workers)
    assert draw(case.data, config, world=world, steps=5) == case.reference[:5]
    first = random.Random(f"{kind} {world} {workers}").randrange(1, BATCHES - 1)
    assert draw(case.data, config, world=world, first=first, steps=2) == case.reference[first : first + 2]


def test_an_epoch_holds_each_sample_once_but_for_the_stated_remainder(cases: dict[str, Case]) -> None:
    case = cases["pictures"]
    assert open_stream(case.data, case.config).epoch_samples == 64 == sum(COUNTS) - sum(COUNTS) % 32
    left_out = []
    for epoch in range(4):
        seen = keys(case.reference[2 * epoch : 2 * epoch + 2])
        assert len(seen) == len(set(seen)) == 64
        left_out.append(frozenset(keys_of(COUNTS) - set(seen)))
    assert len(set(left_out)) == 4, "the same samples are left out every epoch"


def test_what_is_drawn_belongs_to_its_key(cases: dict[str, Case]) -> None:
    """The grid compares streams with each other; this one compares a stream with the shards."""
    for kind in ("pictures", "pictures balanced"):
        for rows, _ in cases[kind].reference:
            for key, _, text, labels in rows:
                shard, index = map(int, key.split("-"))
                assert text in [f"caption {c} of {key}" for c in range(1 + (shard + index) % 3)]
                assert np.flatnonzero(np.frombuffer(labels, bool)).tolist() == [(shard + index) % 4]
    case = cases["features"]
    reader = ShardReader(str(case.data), "train")
    stored = {sample.key: sample for sample in reader}
    assert len(stored) == sum(COUNTS)
    for rows, _ in case.reference:
        for key, image, text, labels in rows:
            assert image == stored[key].image.tobytes()  # type: ignore[union-attr]
            assert text in [one.tobytes() for one in stored[key].texts]  # type: ignore[union-attr]
            assert tuple(np.flatnonzero(np.frombuffer(labels, bool))) == stored[key].labels


def test_balanced_rows_are_of_two_classes(cases: dict[str, Case]) -> None:
    for rows, _ in cases["pictures balanced"].reference:
        assert len(rows) == 64
        assert all(right[3] != wrong[3] for right, wrong in zip(rows[:32], rows[32:], strict=True))


def test_captions_and_crops_are_drawn_anew_each_epoch_and_by_the_seed(tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "data", [8])
    config = StreamConfig(global_batch=8, logical_streams=2)
    captions, crops = defaultdict(set), defaultdict(set)
    for rows, _ in draw(data, config, steps=24):
        for key, image, text, _ in rows:
            captions[key].add(text)
            crops[key].add(image)
    assert {key: len(texts) for key, texts in captions.items()} == {f"0-{i:03d}": 1 + i % 3 for i in range(8)}
    assert min(map(len, crops.values())) > 12
    still = defaultdict(set)
    for rows, _ in draw(data, replace(config, augment=False), steps=6):
        for key, image, _, _ in rows:
            still[key].add(image)
    assert {len(images) for images in still.values()} == {1}
    assert draw(data, config, steps=3, seed=5) == draw(data, config, steps=3, seed=5)
    assert draw(data, config, steps=3, seed=5) != draw(data, config, steps=3, seed=6)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    streams=st.sampled_from([1, 2, 4, 6, 12]),
    chunk=st.integers(1, 3),
    window=st.integers(1, 4),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
    choice=st.randoms(use_true_random=False),
)
def test_the_properties_hold_on_any_shards(
    counts: list[int], streams: int, chunk: int, window: int, seed: int, epoch: int, choice: random.Random
) -> None:
    config = StreamConfig(global_batch=streams * chunk, logical_streams=streams, window=window)
    with tempfile.TemporaryDirectory() as folder:
        data = make_features(Path(folder) / "data", splits={"train": counts}, dims=(2, 2), seed=seed)
        if sum(counts) < config.global_batch:
            with pytest.raises(BadInput, match="fewer than one global batch"):
                open_stream(data, config)
            return
        steps = sum(counts) // config.global_batch
        assert open_stream(data, config).epoch_samples == steps * config.global_batch
        whole = draw(data, config, first=epoch * steps, steps=steps + 1, seed=seed)
        seen = keys(whole[:steps])
        assert len(seen) == len(set(seen)) == steps * config.global_batch
        world = choice.choice([w for w in range(1, streams + 1) if streams % w == 0])
        first = choice.randrange(steps)
        here = draw(data, config, world=world, first=epoch * steps + first, steps=steps + 1 - first, seed=seed)
        assert here == whole[first:]


# ---------------------------------------------------------------------------------------------- who reads what


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(shard, index) of every sample that any reader of this process reads, in order."""
    found: list[tuple[str, int]] = []
    plain = ShardReader.read

    def read(self: ShardReader, shard: int, index: int) -> Sample:
        found.append((self.shards[shard].name, index))
        return plain(self, shard, index)

    monkeypatch.setattr(ShardReader, "read", read)
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_two_ranks_never_read_the_same_sample_and_share_a_shard_only_at_a_cut(
    cases: dict[str, Case], reads: list[tuple[str, int]], world: int
) -> None:
    case = cases["pictures"]
    for epoch in range(3):
        by_rank = []
        for rank in range(world):
            reads.clear()
            list(islice(open_stream(case.data, case.config, rank, world).batches(epoch * 64), 2))
            by_rank.append(list(reads))
        every = [sample for one in by_rank for sample in one]
        assert len(every) == len(set(every)) == 64
        ranks_of = Counter(shard for one in by_rank for shard in {shard for shard, _ in one})
        assert sum(count - 1 for count in ranks_of.values()) <= world, "more shards are shared than there are cuts"


def test_resume_reads_no_sample_before_its_position(cases: dict[str, Case], reads: list[tuple[str, int]]) -> None:
    case = cases["pictures"]
    stream = open_stream(case.data, case.config)
    list(islice(stream.batches(7 * 32), 1))
    assert len(reads) == 32


def test_open_files_are_bounded_whatever_the_number_of_shards(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data", splits={"train": [1] * 90}, dims=(2, 2))
    reader = ShardReader(str(data), "train", open_files=5, indexes=7)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    got = [reader.read(shard, 0).key for _ in range(2) for shard in range(90)]
    assert got == [f"train{shard}-0000" for _ in range(2) for shard in range(90)]
    if descriptors.is_dir():
        assert len(list(descriptors.iterdir())) - before <= 5
    reader.close()


# ---------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("counts", "batch", "streams", "world", "window"),
    [
        ([30, 21], 8, 8, 4, 2),  # fewer shards than ranks
        ([50], 8, 8, 8, 2),  # one shard only
        ([50], 8, 8, 4, 1),  # one shard only, which the rotation cuts in two windows
        ([1] * 33, 8, 4, 4, 4),  # shards of one sample
        ([1] * 33, 8, 8, 8, 1),  # and windows of one sample
        ([5, 1, 2], 8, 8, 2, 3),  # an epoch is one global batch, and all of the data
        ([7, 1, 1], 8, 8, 4, 3),  # one batch an epoch, one sample left out
        ([1, 1], 2, 2, 2, 1),  # the smallest there is
    ],
)
def test_small_and_odd_sets_work(
    tmp_path: Path, counts: list[int], batch: int, streams: int, world: int, window: int
) -> None:
    data = make_pictures(tmp_path / "data", counts)
    config = StreamConfig(global_batch=batch, logical_streams=streams, window=window)
    steps = sum(counts) // batch
    whole = draw(data, config, steps=2 * steps + 1)
    assert draw(data, config, world=world, steps=2 * steps + 1) == whole
    assert draw(data, replace(config, workers=streams // world), world=world, steps=2) == whole[:2]
    for epoch in range(2):
        seen = keys(whole[epoch * steps : (epoch + 1) * steps])
        assert len(seen) == len(set(seen)) == steps * batch
        assert set(seen) <= keys_of(counts)


def test_an_epoch_smaller_than_a_global_batch_is_one_sentence(tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "data", [3, 4])
    for sampling in ("epoch", "balanced"):
        with pytest.raises(BadInput) as error:
            open_stream(data, StreamConfig(global_batch=8, sampling=sampling))
        one_sentence(error, "'train'", "7 samples", "fewer than one global batch", "stream.global_batch", "7 or less")


def test_ranks_that_do_not_divide_the_streams_are_one_sentence(cases: dict[str, Case]) -> None:
    case = cases["pictures"]
    for world in (3, 5, 32):
        with pytest.raises(BadInput) as error:
            open_stream(case.data, case.config, 0, world)
        one_sentence(error, "16 logical streams", f"{world} processes", "1, 2, 4, 8, 16", "stream.logical_streams")


def test_streams_that_do_not_divide_the_batch_are_one_sentence() -> None:
    config = Config(stream=StreamConfig(global_batch=32, logical_streams=12))
    with pytest.raises(BadInput) as error:
        validate(config)
    one_sentence(error, "stream.logical_streams is 12", "32 samples of stream.global_batch")


def test_workers_that_do_not_divide_the_streams_are_fewer_and_said(
    cases: dict[str, Case], caplog: pytest.LogCaptureFixture
) -> None:
    case = cases["pictures"]
    with caplog.at_level(logging.INFO):
        stream = open_stream(case.data, replace(case.config, workers=3), 1, 4)
    assert stream.workers == 2
    assert "2 workers" in caplog.text
    (batch,) = islice(stream.batches(0), 1)
    assert rows_of(batch) == case.reference[0][0][8:16]


def test_a_position_between_batches_is_one_sentence(cases: dict[str, Case]) -> None:
    case = cases["pictures"]
    with pytest.raises(BadInput) as error:
        next(open_stream(case.data, case.config).batches(33))
    one_sentence(error, "position 33", "stream.global_batch 32")


def test_balanced_sampling_needs_two_classes(tmp_path: Path, cases: dict[str, Case]) -> None:
    config = StreamConfig(global_batch=8, sampling="balanced")
    one_class = make_pictures(tmp_path / "data", [9], one_class=True)
    for data in (one_class, cases["no labels"].data, cases["features"].data):  # the last has several labels a sample
        with pytest.raises(BadInput) as error:
            open_stream(data, config)
        one_sentence(error, "stream.sampling=balanced", "two classes", "use epoch")


def _no_shard(data: Path) -> None:
    (data / "train-000001.tar").unlink()


def _no_index(data: Path) -> None:
    (data / index_name("train-000001.tar")).unlink()


def _damaged_index(data: Path) -> None:
    path = data / index_name("train-000001.tar")
    path.write_bytes(path.read_bytes()[:300])


def _index_of_another(data: Path) -> None:
    (data / index_name("train-000001.tar")).write_bytes((data / index_name("train-000000.tar")).read_bytes())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_no_shard, "train-000001.tar"),
        (_no_index, "train-000001.index.npz"),
        (_damaged_index, "train-000001.index.npz"),
        (_index_of_another, "train-000001.index.npz"),
    ],
)
def test_missing_and_damaged_files_are_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], name: str, workers: int
) -> None:
    data = make_pictures(tmp_path / "data", [9, 8])
    spoil(data)
    with pytest.raises(BadInput) as error:
        draw(data, StreamConfig(global_batch=16, logical_streams=4, workers=workers), steps=1)
    one_sentence(error, name)


# ---------------------------------------------------------------------------------------------- bad samples

BAD_COUNTS = [20, 15, 25, 20]  # 80: no remainder with batches of 16
FAULTS = {(0, 3): "image", (0, 4): "text", (1, 14): "label", (2, 0): "image", (2, 1): "label", (2, 2): "text"}
CUT = (3, 17)
"""The last shard ends inside this sample: two more are gone with it."""
BAD = {*FAULTS, *((3, i) for i in range(CUT[1], BAD_COUNTS[3]))}
REASONS = {"image": "the image does not decode", "text": "has no text", "label": "is out of range, there are 4 classes"}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = make_pictures(tmp_path_factory.mktemp("spoilt") / "data", BAD_COUNTS, faults=FAULTS)
    path = data / "train-000003.tar"
    offsets = ShardIndex.from_bytes((data / index_name(path.name)).read_bytes(), path.name).offsets
    path.write_bytes(path.read_bytes()[: int(offsets[CUT[1]]) + 700])
    return data


SPOILT = StreamConfig(global_batch=16, logical_streams=8, window=2, max_bad_share=0.5)


def name_of(sample: tuple[int, int]) -> str:
    """How a line about a bad sample begins: by its key, or by its number where its key is lost."""
    shard, index = sample
    key = index if sample in BAD - set(FAULTS) else f"{shard}-{index:03d}"
    return f"train-{shard:06d}.tar sample {key}:"


def reason_of(sample: tuple[int, int]) -> str:
    return REASONS[FAULTS[sample]] if sample in FAULTS else "the shard is truncated at byte"


def test_a_bad_sample_is_replaced_by_the_next_good_one_of_its_window(spoilt: Path) -> None:
    stream = open_stream(spoilt, SPOILT)
    drawn = draw(spoilt, SPOILT, steps=15)
    named: Counter[tuple[int, int]] = Counter()
    for step, (rows, lines) in enumerate(drawn):
        expected, expected_bad = [], []
        for s in range(8):
            for row in stream.plan.chunk_rows(step, s):
                order = [(row.shard, row.index), *(row.replacement(k) for k in range(row.replacements))]
                good = next(i for i, sample in enumerate(order) if sample not in BAD)
                expected.append(f"{order[good][0]}-{order[good][1]:03d}")
                expected_bad += order[:good]
        assert [row[0] for row in rows] == expected
        assert len(lines) == len(expected_bad)
        for line, sample in zip(lines, expected_bad, strict=True):
            assert line.startswith(name_of(sample))
            assert reason_of(sample) in line
        named.update(expected_bad)
    assert set(named) == BAD, "the case does not meet every bad sample"


def test_every_good_sample_is_still_seen_every_epoch(spoilt: Path) -> None:
    drawn = draw(spoilt, SPOILT, steps=15)
    good = keys_of(BAD_COUNTS) - {f"{shard}-{index:03d}" for shard, index in BAD}
    for epoch in range(3):
        seen = keys(drawn[5 * epoch : 5 * epoch + 5])
        assert len(seen) == 80
        assert set(seen) == good


@pytest.mark.parametrize("sampling", ["epoch", "balanced"])
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 4), (4, 1), (8, 1)])
def test_replacements_do_not_depend_on_ranks_and_workers(spoilt: Path, world: int, workers: int, sampling: str) -> None:
    """Rows and the lines about what was replaced; also from a later position, though the counts begin anew."""
    config = replace(SPOILT, sampling=sampling)
    whole = draw(spoilt, config, steps=7)
    assert any(lines for _, lines in whole[5:])
    drawn = draw(spoilt, replace(config, workers=workers), world=world, first=2, steps=5)
    assert [rows for rows, _ in drawn] == [rows for rows, _ in whole[2:]]
    assert [sorted(lines) for _, lines in drawn] == [sorted(lines) for _, lines in whole[2:]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["image", "text", "label"])
def test_too_many_bad_samples_stop_the_stream_with_one_sentence(tmp_path: Path, fault: str, workers: int) -> None:
    data = make_pictures(tmp_path / "data", [40, 40], faults={(1, i): fault for i in range(0, 40, 8)})
    config = StreamConfig(global_batch=16, logical_streams=8, window=2, workers=workers)
    draw(data, replace(config, max_bad_share=0.2), steps=40)
    with pytest.raises(BadInput) as error:
        draw(data, replace(config, max_bad_share=0.02), steps=60)
    one_sentence(error, "stream.max_bad_share 0.02", str(data), "train-000001.tar sample 1-0", REASONS[fault])
    with pytest.raises(BadInput) as error:
        draw(data, replace(config, max_bad_share=0.0), steps=60)
    one_sentence(error, "stream.max_bad_share 0")


def test_one_bad_sample_among_the_first_does_not_stop_a_run(tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "data", [100, 80], faults={(0, 7): "image"})  # 0.6 %
    config = StreamConfig(global_batch=16, logical_streams=8)
    assert sum(len(lines) for _, lines in draw(data, config, steps=33)) >= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_window_without_a_good_sample_is_one_sentence(tmp_path: Path, workers: int) -> None:
    faults = {(1, i): "image" for i in range(6)}
    data = make_pictures(tmp_path / "data", [30, 6, 28], faults=faults)
    config = StreamConfig(global_batch=16, logical_streams=2, window=1, max_bad_share=1.0, workers=workers)
    with pytest.raises(BadInput) as error:
        draw(data, config, steps=8)
    one_sentence(error, "no usable sample left in a window of", "'train'", "train-000001.tar sample 1-0", "verify")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_single_bad_sample_that_is_a_stream_s_last_window_does_not_stop_a_run(tmp_path: Path, workers: int) -> None:
    """Shards of one sample in windows of one: every cut of a stream leaves its ends alone. The replacement is of the
    window beside it in the same stream, at any world size."""
    data = make_pictures(tmp_path / "data", [1] * 24, faults={(7, 0): "image"})
    config = StreamConfig(global_batch=8, logical_streams=8, window=1, max_bad_share=1.0, workers=workers)
    plan = open_stream(data, config).plan
    step = next(t for t in range(2, 3000, 3) for s in range(8) if plan.chunk_rows(t, s)[0].shard == 7)
    ((rows, lines),) = draw(data, config, first=step, steps=1)
    assert len(lines) == 1
    assert name_of((7, 0)) in lines[0]
    chunks = [[plan.chunk_rows(t, s)[0].shard for s in range(8)] for t in (step - 1, step)]
    expected = [f"{before if own == 7 else own}-000" for before, own in zip(*chunks, strict=True)]
    assert [row[0] for row in rows] == expected
    assert draw(data, config, world=2, first=step, steps=1)[0][0] == rows


def test_all_samples_of_a_class_bad_is_one_sentence_when_balanced(tmp_path: Path) -> None:
    faults = {(0, i): "text" for i in range(2, 40, 4)}
    data = make_pictures(tmp_path / "data", [40], faults=faults)
    config = StreamConfig(global_batch=16, logical_streams=2, sampling="balanced", max_bad_share=1.0)
    with pytest.raises(BadInput) as error:
        draw(data, config, steps=8)
    one_sentence(error, "no usable sample left", "has no text")


def test_iterating_a_reader_passes_bad_samples_over(spoilt: Path) -> None:
    """Decoding is not tried there: an image that does not decode is still listed."""
    got = [sample.key for sample in ShardReader(str(spoilt), "train")]
    lost = {f"{s}-{i:03d}" for s, i in BAD if FAULTS.get((s, i)) != "image"}
    assert got == [key for key in sorted(keys_of(BAD_COUNTS)) if key not in lost]
    with pytest.raises(BadSample, match=r"train-000003\.tar sample 18: the shard is truncated at byte \d+"):
        ShardReader(str(spoilt), "train").read(3, 18)


def features_with_faults(folder: Path) -> Path:
    """Features of which one holds NaN, one has no text and one a label that is no class, of 60; and a clean val."""
    data = make_features(folder, splits={"train": [30, 30], "val": [16]}, dims=(6, 4))
    rng = np.random.default_rng(1)
    infos = []
    for shard in range(2):
        members = []
        for i in range(30):
            image, label = rng.normal(size=6).astype(np.float32), i % 3
            if (shard, i) == (0, 4):
                image[2] = np.nan
            members.append((f"{shard}-{i}.image.npy", npy(image)))
            if (shard, i) != (1, 9):
                members.append((f"{shard}-{i}.text.npy", npy(rng.normal(size=4).astype(np.float32))))
            label = 3 if (shard, i) == (1, 20) else label
            members.append((f"{shard}-{i}.json", json.dumps({"label": label}).encode()))
        write_tar(data / f"train-{shard:06d}.tar", members)
        infos.append(index_tar(data / f"train-{shard:06d}.tar"))
    val = [index_tar(data / "val-000000.tar")]
    kind = {"image": "features", "image_dim": 6, "text": "features", "text_dim": 4, "label_kind": "single"}
    write_manifest(data, {"train": infos, "val": val}, classes=["a", "b", "c"], **kind)
    return data


@pytest.mark.process
def test_bad_samples_are_counted_in_metrics_and_named_in_the_log(tmp_path: Path) -> None:
    data = features_with_faults(tmp_path / "data")
    config = StreamConfig(global_batch=12, max_bad_share=0.2)
    expected = [lines for _, lines in draw(data, config, steps=15, seed=0)]
    command = ["launchers/train.py", "--preset", "smoke", "--data", str(data), "--output", str(tmp_path / "run")]
    command += ["stream.global_batch=12", "stream.max_bad_share=0.2", "train.epochs=3", "train.log_every=1"]
    command += ["train.val_every=0", "train.tracker=none", "train.threads=1", "train.report=false"]
    done = forked.run(command, {**environment(), "ACCELERATE_USE_CPU": "true", "COLUMNS": "300"})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["bad_samples"] for line in lines if line["kind"] == "train"]
    assert counts == np.cumsum([len(one) for one in expected]).tolist()
    assert counts[-1] >= 9  # three bad ones in each of three epochs
    said = done.stdout + done.stderr
    assert said.count("bad sample replaced:") == counts[-1]
    for name, reason in (("0-4", "holds NaN or Inf"), ("1-9", "has no text"), ("1-20", "out of range")):
        assert any(f"sample {name}: " in line and reason in line for line in said.splitlines()), said


# ---------------------------------------------------------------------------------------------- batches


def test_a_batch_is_pinned_by_the_data_loader_s_protocol(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-locked memory needs CUDA: here a copy stands for it, and the DataLoader's own function asks for it."""
    pinned: list[torch.Tensor] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for kind, tensors in (("pictures", 2), ("features", 3), ("no labels", 2)):
        batch = next(open_stream(cases[kind].data, cases[kind].config).batches(0))
        made = torch.utils.data._utils.pin_memory.pin_memory(batch)
        assert isinstance(made, Batch)
        assert rows_of(made) == rows_of(batch)
        assert (made.size, made.bad) == (batch.size, batch.bad)
        held = {id(x) for x in (made.image, made.text, made.labels) if isinstance(x, torch.Tensor)}
        assert held == {id(x) for x in pinned}
        assert len(held) == tensors
        pinned.clear()


@pytest.mark.parametrize("kind", ["pictures balanced", "features balanced", "no labels"])
def test_parts_of_several_workers_are_joined_in_pinned_memory(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def record(*args: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*args, **options)  # type: ignore[call-overload]

    stream = open_stream(cases[kind].data, cases[kind].config)
    parts = [stream.read_step(0, range(8)), stream.read_step(0, range(8, 16))]
    monkeypatch.setattr(torch, "empty", record)
    for pinned in (False, True):
        assert rows_of(join(parts, pinned)) == cases[kind].reference[0][0]
        assert len(asked) >= 2
        assert set(asked) == {pinned}
        asked.clear()
    assert join(parts[:1], True) is parts[0]


def test_a_mixture_prefetches_the_next_window_of_each_set(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases["mixture"]
    stream = open_stream(case.data, case.config)
    asked: list[set[str]] = [set(), set()]
    for source, reader in enumerate(stream.readers):
        monkeypatch.setattr(
            reader.store, "prefetch", lambda shards, to=asked[source]: to.update(shard.name for shard in shards)
        )
    assert isinstance(stream.plan, MixturePlan)
    list(islice(stream.batches(0), 8))
    assert asked[0] == {f"train-{i:06d}.tar" for i in range(5)}
    assert asked[1] == {"train-000000.tar", "train-000001.tar"}


# ---------------------------------------------------------------------------------------------- memory

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")

MEASURE = """
import gc, json, random, sys, time
import numpy as np
from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.order import Plan
from cmgan_dist.data.stream import Stream

def memory(which):  # MiB; VmHWM is this program's own peak, getrusage's begins at that of the process that forked it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(which)) / 1024
"""

MANY = (
    MEASURE
    + """
base = memory("VmHWM")
start = time.monotonic()
config = StreamConfig(global_batch=4096, logical_streams=32)
stream = Stream(sys.argv[1], config, seed=1)  # one rank holds all logical streams: the most that one can hold
opened = time.monotonic() - start
plan, rng = stream.plan, random.Random(0)
steps = [0, plan.steps - 1, plan.steps, *(rng.randrange(10 * plan.steps) for _ in range(10))]
for step in steps:
    seen = {(r.shard, r.index) for s in stream.held for r in plan.chunk_rows(step, s)}
    assert len(seen) == 4096
    assert all(0 <= shard < 100_000 and 0 <= index < 10_000 for shard, index in seen)
print(json.dumps({"samples": plan.samples, "epoch": stream.epoch_samples, "opened": opened,
    "drawn": time.monotonic() - start - opened, "base": base, "peak": memory("VmHWM")}))
"""
)

LONG = (
    MEASURE
    + """
plan = Plan(np.full(20, 10_000), global_batch=2000, streams=20, window=1, seed=0)
after = []
for epoch in range(20):
    for step in range(0, plan.steps, 25):
        for s in range(20):
            plan.chunk_rows(epoch * plan.steps + step, s)
    gc.collect()
    after.append(memory("VmRSS"))
print(json.dumps({"after": after}))
"""
)


def measured(script: str, *args: object) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kept", [83, 10, 0])
def test_features_are_parsed_once_while_there_is_room(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    case = cases["features"]
    parsed: list[str] = []
    size = ShardReader(str(case.data), "train").read(0, 0).nbytes
    monkeypatch.setattr("cmgan_dist.data.reader.KEPT_BYTES", kept * size)
    plain = Judge.read

    def read(self: Judge, key: str, members: dict[str, bytes]) -> Sample:
        parsed.append(key)
        return plain(self, key, members)

    monkeypatch.setattr(Judge, "read", read)
    assert draw(case.data, case.config, steps=BATCHES) == case.reference
    expected = Counter(keys(case.reference))
    for key in list(expected)[:kept]:
        expected[key] = 1
    assert Counter(parsed) == expected


@pytest.mark.process
@needs_proc
def test_a_manifest_of_a_billion_samples_opens_in_seconds_below_a_gib(tmp_path: Path) -> None:
    """Opening a stream reads the manifest and nothing else: the shards of this one are empty files."""
    Path(tmp_path, "files").mkdir()
    for i in range(1000):
        Path(tmp_path, "files", f"{i:03d}.tar").touch()
    for i in range(100):
        Path(tmp_path, f"{i:02d}").symlink_to("files")  # 100,000 names for 1000 files
    shards = [
        f'{{"name": "{i // 1000:02d}/{i % 1000:03d}.tar", "samples": 10000, "bytes": 500000000, "sha256": "{i:064x}"}}'
        for i in range(100_000)
    ]
    head = '{"version": 1, "name": "many", "label_kind": "none", "classes": [], "splits": {"train": ['
    Path(tmp_path, "manifest.json").write_text(head + ",\n".join(shards) + "]}}")
    found = measured(MANY, tmp_path)
    print(found)
    assert found["samples"] == 10**9
    assert found["epoch"] == 10**9 - 10**9 % 4096
    assert found["peak"] - found["base"] < 512, "well under 1 GiB was promised"
    assert found["opened"] + found["drawn"] < 60


@pytest.mark.process
@needs_proc
def test_memory_does_not_grow_with_the_epochs() -> None:
    after = measured(LONG)["after"]
    print(after)
    assert after[-1] - after[3] < 12, after  # an epoch's order is 3 MiB: kept, 16 epochs of it would be 50


@pytest.mark.process
@needs_proc
def test_memory_does_not_grow_with_the_samples_of_a_plan() -> None:
    """The order of a window is held, not that of an epoch."""
    script = (
        MEASURE
        + """
plan = Plan(np.full(int(sys.argv[1]), 10_000), global_batch=2000, streams=20, window=1, seed=0)
base = memory("VmHWM")
for step in range(0, plan.steps, max(1, plan.steps // 40)):
    for s in range(20):
        plan.chunk_rows(step, s)
print(json.dumps({"grown": memory("VmHWM") - base}))
"""
    )
    small, large = (measured(script, shards)["grown"] for shards in (100, 3000))  # 1e6 and 3e7 samples
    print(small, large)
    assert large < small + 24, "an order of 3e7 samples is 480 MiB"


def test_counts_alone_make_the_plan(cases: dict[str, Case]) -> None:
    """The plan that a stream follows can be computed from the manifest's counts, without a shard or a sidecar."""
    case = cases["features"]
    plan = Plan(np.array(COUNTS), global_batch=32, streams=16, window=2, seed=5)
    for step, (rows, _) in enumerate(case.reference):
        samples = [(r.shard, r.index) for s in range(16) for r in plan.chunk_rows(step, s)]
        assert [row[0] for row in rows] == [f"train{shard}-{index:04d}" for shard, index in samples]
