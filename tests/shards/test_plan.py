"""Plans: the same for any number of partitions and processes and any order of rows; equal contents on one side."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.errors import BadInput
from shards.draw import Drawn, draw_splits
from shards.pairs import Draw, FileSlice, RawPair, RawPairs
from shards.partitions import Partitions, decode, encode
from shards.plan import Plan, plan_shards
from shards.sources.files import PlainFile
from tests.toy import files_of, picture, run_shards, samples_of, write_table


def pair(key: str, texts: tuple[str, ...] = ("a",), split: str = "", **fields: object) -> RawPair:
    whole = {"image": FileSlice("/x", 0, 5, key), "labels": (), "where": f"row of {key}", **fields}
    return RawPair(key, split, texts=texts, **whole)  # type: ignore[arg-type]


def planned(
    folder: Path,
    pairs: list[RawPair],
    *,
    partitions: int = 1,
    draw: Draw = Draw(0, 0),  # noqa: B008 -- it is frozen
    most: int = 1000,
    most_bytes: float = 1e9,
    skip_bad: bool = False,
) -> Plan:
    rows = Partitions(folder, partitions)
    rows.add_all(pairs)
    source = RawPairs("toy", "none", [], "", {}, draw)
    return plan_shards(rows, source, most, most_bytes, skip_bad, 1)


def keys_of(plan: Plan) -> dict[str, list[str]]:
    return {shard.name: [each.key for each in shard.read(plan.folder)] for shard in plan.shards}


@pytest.mark.parametrize("image", [PlainFile("/a/\udce9.jpg"), FileSlice("/b", 3, 4, "ab"), np.arange(3, dtype="f4")])
def test_a_row_comes_back_from_disk(image: object) -> None:
    row = pair("k", ("one\n", "猫"), "val", image=image, labels=("cat", 3), identity="i")
    back = decode(encode(row))
    if isinstance(image, np.ndarray):
        np.testing.assert_array_equal(np.asarray(back.image), image)
        back, row = back.with_image(PlainFile("")), row.with_image(PlainFile(""))
    assert vars(back) == vars(row)


def test_partitions_and_the_order_of_rows_change_no_shard(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [pair(f"{i}", (f"text {i % 90}",), rng.choice(["", "train", "test"]), labels=()) for i in range(200)]
    shuffled = rng.sample(rows, len(rows))
    draw = Draw(0.2, 0)
    plans = [
        planned(tmp_path / f"{n}", of, partitions=n, draw=draw, most=16, most_bytes=60)
        for n, of in ((1, rows), (7, rows), (64, shuffled))
    ]
    assert [(s.name, s.digest) for s in plans[0].shards] == [(s.name, s.digest) for s in plans[2].shards]
    assert keys_of(plans[0]) == keys_of(plans[1]) == keys_of(plans[2])
    assert {s.split for s in plans[0].shards} == {"train", "val", "test"}


def naive_cut(sizes: list[int], most: int, most_bytes: float) -> list[int]:
    limit = -(-len(sizes) // -(-len(sizes) // most))
    counts, count, total = [], 0, 0
    for size in sizes:
        if count and (count == limit or total + size > most_bytes):
            counts.append(count)
            count = total = 0
        count, total = count + 1, total + size
    return [*counts, count]


@pytest.mark.parametrize("partitions", [1, 5])
def test_cuts_are_those_of_a_plain_loop(tmp_path: Path, partitions: int) -> None:
    rng = random.Random(partitions)
    for number in range(30):
        sizes = {f"{i}": rng.choice([1, 5, 30, 200]) for i in range(rng.randint(1, 60))}
        rows = [pair(key, ("a",), "train", image=FileSlice("/x", 0, size - 1)) for key, size in sizes.items()]
        most, most_bytes = rng.randint(1, 20), rng.choice([10, 100, 1e9])
        plan = planned(tmp_path / f"{number}", rows, partitions=partitions, most=most, most_bytes=most_bytes)
        order = list(itertools.chain(*keys_of(plan).values()))
        assert sorted(order) == sorted(sizes)
        expected = naive_cut([sizes[key] for key in order], most, most_bytes)
        assert [shard.samples for shard in plan.shards] == expected


def test_rows_of_one_picture_are_one_sample_whatever_lies_between(tmp_path: Path) -> None:
    rows = [pair(f"{i % 10}", (f"text {i}",), identity=f"{i % 10}") for i in range(30)]
    plan = planned(tmp_path / "a", rows, partitions=3)
    found = {each.key: each.texts for shard in plan.shards for each in shard.read(plan.folder)}
    assert found["4"] == ("text 4", "text 14", "text 24")
    assert len(found) == 10
    with pytest.raises(
        BadInput, match=r"row of 4: has another label or split than row of 4 for image 4; .* --skip-bad"
    ):
        planned(tmp_path / "b", [*rows, pair("4", split="val", identity="4")], partitions=3)
    with pytest.raises(BadInput, match=r"row of 4: has the same key '4' as row of 4: rename one .* --skip-bad"):
        planned(tmp_path / "c", [*rows, pair("4", identity="4.png")], partitions=3)


# ---------------------------------------------------------------------------------------------- splits that are drawn


def sides(plan: Plan) -> dict[str, str]:
    return {each.key: shard.split for shard in plan.shards for each in shard.read(plan.folder)}


@pytest.mark.parametrize("seed", range(5))
def test_equal_pictures_and_texts_never_lie_on_two_sides(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        pair(
            f"{i}",
            (f"Text  {rng.randrange(400)}", f"{rng.choice(['text', 'TEXT'])} {rng.randrange(400)} "),
            rng.choice(["", "train"]),
            image=FileSlice("/x", 0, 5, f"{rng.randrange(600)}"),
        )
        for i in range(300)
    ]
    plan = planned(tmp_path / "plan", rows, partitions=4, draw=Draw(0.3, 0.2))
    side = sides(plan)
    assert set(side.values()) == {"train", "val", "test"}
    for a, b in itertools.combinations(rows, 2):
        texts = [{" ".join(text.lower().split()) for text in each.texts} for each in (a, b)]  # type: ignore[union-attr]
        if a.image == b.image or texts[0] & texts[1]:
            assert side[a.key] == side[b.key]


def test_a_group_larger_than_a_split_stays_in_train_and_images_alone_may_be_asked_for(tmp_path: Path) -> None:
    rows = [pair(f"{i}", ("a cat" if i % 2 else f"text {i}",)) for i in range(400)]
    side = sides(planned(tmp_path / "a", rows, draw=Draw(0.2, 0)))
    assert {side[f"{i}"] for i in range(1, 400, 2)} == {"train"}
    assert 20 < sum(side[f"{i}"] == "val" for i in range(0, 400, 2)) < 60
    side = sides(planned(tmp_path / "b", rows, draw=Draw(0.2, 0, "images")))
    assert 50 < sum(value == "val" for value in side.values()) < 110


def test_groups_of_many_are_drawn_as_often_as_single_samples(tmp_path: Path) -> None:
    rows = [pair(f"{i}", (f"text {i // 10}",)) for i in range(10_000)]
    side = list(sides(planned(tmp_path / "a", rows, draw=Draw(0.1, 0.3))).values())
    assert 0.25 < side.count("test") / len(side) < 0.35
    assert 0.07 < side.count("val") / len(side) < 0.13


def test_links_are_compared_in_ranges_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        links = np.stack(
            [rng.integers(50, size=200, dtype=np.uint64) << np.uint64(58), rng.integers(2**62, size=200)], 1
        )
        links = links.astype(np.uint64)
        np.save(tmp_path / f"links-{number:04d}.npy", links[np.argsort(links[:, 0])])
    whole = draw_splits(tmp_path, 3, Draw(0.1, 0), 600)
    monkeypatch.setattr("shards.draw.LINKS_AT_ONCE", 10)
    parts = draw_splits(tmp_path, 3, Draw(0.1, 0), 600)
    assert len(whole.linked)
    for name in ("linked", "numbers", "sizes"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert Drawn(Draw(0, 0)).of(np.arange(3, dtype=np.uint64)) == {}


def test_pictures_in_several_parquet_files_on_two_processes(tmp_path: Path) -> None:
    """Partitions, processes and the place of rows in files change no byte; equal pictures of other names are one."""
    rows = [{"image": {"bytes": picture(i % 40), "path": f"p{i}.png"}, "text": f"text {i}"} for i in range(60)]
    outputs = []
    for name, parts, processes in (("one", 1, 1), ("two", 3, 2)):
        (tmp_path / name).mkdir()
        for part in range(parts):
            size = -(-len(rows) // parts)
            write_table(tmp_path / name / f"{part}.parquet", rows[part * size : (part + 1) * size])
        out = tmp_path / f"out-{name}"
        command = ("build", "table", tmp_path / name, "--name", "x", "--output", out, "--processes", processes)
        run_shards(*command, "--val", 0.3, "--test", 0)
        outputs.append({n: data for n, data in files_of(out).items() if n.endswith(".tar")})
    assert outputs[0] == outputs[1]
    found = samples_of(tmp_path / "out-one") | samples_of(tmp_path / "out-one", "val")
    assert len(found) == 40
    assert any(texts == ["text 3", "text 43"] for texts, _ in found.values())
    assert load_manifest(tmp_path / "out-one").details["together"] == "images-and-texts"
    assert not list((tmp_path / "out-one").glob(".*"))


def test_with_skip_bad_the_later_of_two_that_contradict_each_other_is_left_out(tmp_path: Path) -> None:
    rows = [pair(f"{i % 3}", (f"text {i}",), "train", identity=f"{i % 3}") for i in range(6)]
    rows += [pair("1", ("lost",), "test", identity="1"), pair("2", ("lost too",), "train", identity="2.png")]
    plan = planned(tmp_path / "plan", [*rows, pair("3", ("new",), "test")], partitions=2, skip_bad=True)
    found = {each.key: (each.split, each.texts) for shard in plan.shards for each in shard.read(plan.folder)}
    texts = {f"{i}": ("train", (f"text {i}", f"text {i + 3}")) for i in range(3)}
    assert found == texts | {"3": ("test", ("new",))}
    assert sorted(plan.left_out) == [
        "row of 1: has another label or split than row of 1 for image 1",
        "row of 2: has the same key '2' as row of 2: rename one of them",
    ]
