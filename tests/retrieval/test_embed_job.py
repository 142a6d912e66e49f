"""Embedding: the figures of an evaluation, resumed and divided alike to the byte, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmgan_dist.data.manifest import MANIFEST_NAME
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from cmgan_dist.models.saved import load_generator, read_model, save_model, stored_tensors
from cmgan_dist.models.weights import weights_sha256
from cmgan_dist.retrieval import embed_source
from cmgan_dist.retrieval.embeddings import EmbeddingSet
from cmgan_dist.retrieval.evaluate import embeddings_of, evaluate_embedded, open_task, run_task
from cmgan_dist.retrieval.model import load_model
from tests.retrieval.embed_cases import embedded, files, raw_run, whole
from tests.toy import jpeg, make_features, make_raw, save_untrained, small_config


@pytest.fixture
def features(tmp_path: Path) -> tuple[Path, Path]:
    """A run on features and data of three training shards."""
    data = make_features(tmp_path / "data", captions=2)
    save_untrained(tmp_path / "run", data, small_config(8, eval__batch=7))
    return tmp_path / "run", data


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["raw", "features", "mixed"])
def test_figures_are_those_of_an_evaluation_to_the_last_digit(
    kind: str, features: tuple[Path, Path], tmp_path: Path
) -> None:
    run, data = raw_run(tmp_path, name="raw_run") if kind == "raw" else features
    if kind == "mixed":
        run = tmp_path / "mixed"
        save_untrained(run, data, small_config(8, eval__batch=7), mixed=True)
    made = whole(run, tmp_path / "emb", data=data)
    for split in ("train", "test"):
        expected = run_task(open_task(run, str(data), split=split), baselines=False)
        assert evaluate_embedded(tmp_path / "emb", split=split) == expected.record["metrics"]
        found = embeddings_of(made, split)
        assert torch.equal(found.image, expected.vectors.image)
        assert torch.equal(found.text, expected.vectors.text)
    with pytest.raises(BadInput, match="of a split 'night'"):
        evaluate_embedded(tmp_path / "emb", split="night")


def test_items_say_what_each_vector_is_of(tmp_path: Path) -> None:
    run, data = raw_run(tmp_path)
    made = whole(run, tmp_path / "emb", data=data, splits="test,val", dtype="float16")
    assert [(s.name, s.split, s.images, s.texts) for s in made] == [
        ("val-000000", "val", 16, 31),
        ("test-000000", "test", 16, 31),
    ]
    assert (made.base.tolist(), made.first_item(1), made.dim, made.counts.tolist()) == (
        [0, 47, 94],
        47,
        8,
        [[16, 31], [16, 31]],
    )
    samples = list(ShardReader(str(data), "test"))
    rows = made.items(1).to_pylist()
    expected: list[dict[str, Any]] = []
    for modality in ("image", "text"):
        for number, sample in enumerate(samples):
            for caption in sample.texts if modality == "text" else [None]:
                place = {"owner": number, "labels": list(sample.labels), "shard": "test-000000.tar", "row": number}
                expected.append({"modality": modality, "key": sample.key, "caption": caption, **place})
    assert rows == expected
    model = load_model(run)
    texts = [row["caption"] for row in rows[16:]]
    images = [sample.image for sample in samples]
    assert made.vectors("text", 1).dtype == np.float16
    np.testing.assert_allclose(made.vectors("image", 1), model.encode_images(images), atol=2e-3)
    np.testing.assert_allclose(made.vectors("text", 1), model.encode_texts(texts), atol=2e-3)
    manifest = made.manifest
    assert (manifest.model.run, manifest.model.data_name) == (str(run), "toy")
    assert (manifest.source.kind, manifest.source.location) == ("shards", str(data))
    assert manifest.classes == ["class 0", "class 1", "class 2"]


def test_raw_data_goes_through_the_backbones_of_a_run_on_features(tmp_path: Path) -> None:
    """The run's features are said to come from a backbone whose weights lie in a file."""
    raw_run_folder, data = raw_run(tmp_path)
    spec = json.loads((raw_run_folder / "best" / "model.json").read_text())
    images = load_model(raw_run_folder).backbone("image")
    weights = tmp_path / "weights.safetensors"
    save_file(images.model.state_dict(), weights)  # type: ignore[union-attr]
    made = {"backbone": "test_efficientnet", "weights": str(weights), "weights_sha256": weights_sha256(images)}
    features = make_features(tmp_path / "data", dims=(spec["image"]["dim"], 7))
    manifest = json.loads((features / "manifest.json").read_text())
    manifest["details"] = {"image": made | {"image_size": 32}}
    (features / "manifest.json").write_text(json.dumps(manifest))
    save_untrained(tmp_path / "on_features", features, small_config(8))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for sample in list(ShardReader(str(data), "test"))[:5]:
        (pictures / f"{sample.key}.jpg").write_bytes(sample.image)  # type: ignore[arg-type]
    found = whole(tmp_path / "on_features", tmp_path / "emb", pictures=pictures)
    expected = load_model(tmp_path / "on_features").encode_images(sorted(pictures.iterdir()))
    np.testing.assert_allclose(found.vectors("image", 0), expected, atol=1e-6)
    with pytest.raises(BadInput, match="takes text features of 7 numbers and does not say what made them"):
        embedded(tmp_path / "on_features", tmp_path / "raw_emb", data=data)


def test_pictures_alone_and_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_source, "PICTURES", 3)
    monkeypatch.setattr(embed_source, "TEXTS", 3)
    run, _ = raw_run(tmp_path)
    pictures, rng = tmp_path / "pictures", np.random.default_rng(0)
    (pictures / "b").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"has no \.jpg, \.png or \.webp files"):
        embedded(run, tmp_path / "images", pictures=pictures)
    (pictures / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for name in ("z.jpg", "a.JPEG", "b/1.jpg", "c/1.jpg", ".hidden.jpg", "b/readme.txt"):
        (pictures / name).write_bytes(jpeg(rng))
    made = whole(run, tmp_path / "images", pictures=pictures)
    assert [(s.name, s.split, s.images, s.texts) for s in made] == [
        ("pictures-000000", "", 3, 0),
        ("pictures-000001", "", 1, 0),
    ]
    keys = [key for shard in made for key in made.items(shard)["key"].to_pylist()]
    assert keys == ["a.JPEG", "b/1.jpg", "c/1.jpg", "z.jpg"]
    assert made.vectors("text", 0).shape == (0, 8)
    assert not list((tmp_path / "images").glob("*.text.npy"))
    found = np.concatenate([made.vectors("image", shard) for shard in made])
    np.testing.assert_allclose(found, load_model(run).encode_images([pictures / key for key in keys]), atol=3e-6)

    lines = ["a red dog", "blue boat ", "green", "a circle"]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"key": f"k{i}", "text": t}) + "\n" for i, t in enumerate(lines))
    )
    plain, named = (whole(run, tmp_path / end, texts=tmp_path / f"texts.{end}") for end in ("txt", "jsonl"))
    for made, keys in ((plain, ["1", "2", "3", "4"]), (named, ["k0", "k1", "k2", "k3"])):
        assert [(s.name, s.images, s.texts) for s in made] == [("texts-000000", 0, 3), ("texts-000001", 0, 1)]
        rows = [row for shard in made for row in made.items(shard).to_pylist()]
        assert [row["key"] for row in rows] == keys
        assert [row["caption"] for row in rows] == [line.strip() for line in lines]
        assert {(row["modality"], row["owner"]) for row in rows} == {("text", -1)}
        found = np.concatenate([made.vectors("text", shard) for shard in made])
        np.testing.assert_allclose(found, load_model(run).encode_texts(lines), atol=1e-6)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket/emb"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_url_holds_what_a_folder_holds(features: tuple[Path, Path], tmp_path: Path, memory: str) -> None:
    run, data = features
    local, remote = whole(run, tmp_path / "emb", data=data), whole(run, memory, data=data)
    for shard in local:
        np.testing.assert_array_equal(local.vectors("image", shard), remote.vectors("image", shard))
        assert local.items(shard).equals(remote.items(shard))
    assert whole(run, memory, data=data).manifest == local.manifest


# ---------------------------------------------------------------------------------------------- resumed, divided


def test_what_is_missing_or_damaged_is_made_anew_to_the_same_bytes(features: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = features
    emb = tmp_path / "emb"
    whole(run, emb, data=data)
    expected = files(emb)
    (emb / "train-000000.record.json").unlink()
    damaged = bytearray((emb / "train-000001.text.npy").read_bytes())
    damaged[200] ^= 1
    (emb / "train-000001.text.npy").write_bytes(damaged)
    (emb / "val-000000.items.parquet").unlink()
    (emb / "test-000000.record.json").write_text("{")
    (emb / "embeddings.json").unlink()
    (emb / ".elsewhere-1-ab.tmp").write_text("of another host")
    before = {name: (emb / name).stat().st_mtime_ns for name in expected if (emb / name).exists()}
    whole(run, emb, data=data)
    (emb / ".elsewhere-1-ab.tmp").unlink()
    assert files(emb) == expected
    kept = [name for name, time in before.items() if (emb / name).stat().st_mtime_ns == time]
    assert sorted(name.partition(".")[0] for name in kept) == ["train-000002"] * 4


def test_tasks_and_a_finish_give_the_bytes_of_one(
    features: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = features
    whole(run, tmp_path / "one", data=data)
    expected = files(tmp_path / "one")
    two = tmp_path / "two"
    with pytest.raises(BadInput, match=r"5 of 5 parts have no whole embeddings yet \(train-000000\)"):
        embedded(run, two, data=data, finish=True)
    assert embedded(run, two, data=data, task="1/2") is None
    assert not (two / "embeddings.json").exists()
    assert "task 1/2 is done; 3 of 5 parts are left to other tasks" in capsys.readouterr().out
    assert embedded(run, two, data=data, task="0/2") is not None
    assert files(two) == expected
    (two / "embeddings.json").unlink()
    assert embedded(run, two, data=data, finish=True) is not None
    assert files(two) == expected


# ---------------------------------------------------------------------------------------------- what is refused


def test_embeddings_of_others_are_refused_and_replaced_when_asked(features: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = features
    emb, fresh = tmp_path / "emb", tmp_path / "fresh"
    other = make_features(tmp_path / "other", splits={"train": [40], "more": [5]}, captions=2, seed=1)
    whole(run, emb, data=data, splits="train")
    for options, said in (
        ({"data": data, "splits": "train", "dtype": "float16"}, r"with other options \(dtype float32\)"),
        ({"data": data, "splits": "test"}, r"embeddings of other data \(train-000000 is none of .*data's"),
        ({"data": other}, r"embeddings of other data \(train-000001 is none of .*other's"),
    ):
        with pytest.raises(BadInput, match=f"{said}.*--overwrite"):
            embedded(run, emb, **options)
    save_untrained(tmp_path / "second", data, small_config(8, eval__batch=7), seed=1)
    with pytest.raises(BadInput, match=r"record.json is of embeddings by another model than that of .*--overwrite"):
        embedded(tmp_path / "second", emb, data=data, splits="train")
    whole(run, emb, data=other, overwrite=True)
    whole(run, fresh, data=other)
    assert files(emb) == files(fresh)
    shutil.rmtree(fresh)
    shutil.copytree(data, tmp_path / "changed")
    (tmp_path / "changed" / "test-000000.tar").write_bytes((data / "val-000000.tar").read_bytes())
    with pytest.raises(BadInput, match=r"test-000000\.tar is not what its manifest says"):
        embedded(run, fresh, data=tmp_path / "changed", splits="test")


def test_labels_that_were_added_or_renamed_are_seen(features: tuple[Path, Path], tmp_path: Path) -> None:
    """The tars are the same; how their labels are read says the manifest alone."""
    (run, data), emb = features, tmp_path / "emb"
    manifest = json.loads((data / MANIFEST_NAME).read_text())
    kinds: list[dict[str, Any]] = [{"label_kind": "none", "classes": []}, {}, {"classes": ["a", "b", "d"]}]
    for number, changed in enumerate(kinds):
        (data / MANIFEST_NAME).write_text(json.dumps(manifest | changed))
        if number:
            with pytest.raises(BadInput, match=r"is of embeddings of data with other labels or classes: .*--overwrite"):
                embedded(run, emb, data=data, splits="test")
        made = whole(run, emb, data=data, splits="test", overwrite=True)
        assert made.manifest.classes == (manifest | changed)["classes"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "name what is to be embedded by one of --data, --pictures and --texts"),
        ({"data": "a", "texts": "b"}, "by one of --data"),
        ({"pictures": "nowhere"}, "--pictures .*nowhere is no folder"),
        ({"texts": "nowhere.txt"}, "nowhere.txt is no file"),
        ({"texts": "x", "splits": "train"}, "--splits is given without --data"),
        ({"data": "DATA", "splits": "dev"}, "toy has no split 'dev': its manifest has train, val, test"),
        ({"data": "DATA", "batch": 0}, "--batch is 0"),
        ({"data": "DATA", "processes": 0}, "--processes is 0"),
        ({"data": "DATA", "task": "2/2"}, "--task is '2/2'"),
        ({"data": "OTHER"}, "the images of .*other are features of 9 numbers"),
        ({"data": "DATA", "output": "DATA"}, "--output .*data is a data set"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    options: dict[str, Any], said: str, features: tuple[Path, Path], tmp_path: Path
) -> None:
    run, data = features
    make_features(tmp_path / "other", dims=(9, 7))
    places = {"DATA": str(data), "OTHER": str(tmp_path / "other")}
    given = {name: places.get(value, value) for name, value in options.items()}
    with pytest.raises(BadInput, match=said):
        embedded(run, given.pop("output", tmp_path / "emb"), **given)
    assert not (tmp_path / "emb").exists()


def test_bad_samples_are_named_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = raw_run(tmp_path, spoil={3: "image", 7: "text", 9: "label"})
    with pytest.raises(BadInput, match=r"raw: train-000000\.tar sample train3: the image .* or pass --skip-bad"):
        embedded(run, tmp_path / "emb", data=data)
    made = whole(run, tmp_path / "emb", data=data, skip_bad=True)
    rows = made.items(0).to_pylist()
    left = [number for number in range(40) if number not in (3, 7, 9)]
    assert [row["row"] for row in rows[: made.manifest.shards[0].images]] == left
    assert all(rows[row["owner"]]["key"] == row["key"] for row in rows)
    assert len(made.vectors("text", 0)) == len(rows) - len(left)
    said = capsys.readouterr().err
    assert "left out 3 bad samples" in said
    assert "sample train7: has no text" in said
    with pytest.raises(BadInput, match="sample train3"):
        embedded(run, tmp_path / "emb", data=data)
    (tmp_path / "texts.txt").write_bytes(b"a dog\n\nboat \xff\nblue\n")
    with pytest.raises(BadInput, match=r"texts\.txt: line 2: has no text"):
        embedded(run, tmp_path / "texts", texts=tmp_path / "texts.txt")
    texts = whole(run, tmp_path / "texts", texts=tmp_path / "texts.txt", skip_bad=True)
    assert texts.items(0)["row"].to_pylist() == [0, 3]


def test_a_model_that_has_diverged_is_refused(features: tuple[Path, Path], tmp_path: Path) -> None:
    data = make_features(tmp_path / "nan")
    saved = read_model(features[0])
    generator = load_generator(saved)
    torch.nn.init.constant_(generator.shared.linear[0].weight, torch.nan)  # type: ignore[arg-type]
    save_model(tmp_path / "run2" / "best", saved.spec, saved.config, stored_tensors(generator), progress={})
    with pytest.raises(
        BadInput, match=r"the vectors of train-000000\.tar are not finite: the model in .* has diverged"
    ):
        embedded(tmp_path / "run2", tmp_path / "emb", data=data)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("embeddings.json", None, "embeddings.json does not exist"),
        (
            "embeddings.json",
            lambda b: b.replace(b'"version": 1', b'"version": 9'),
            "has version 9, this program reads 1",
        ),
        ("embeddings.json", lambda b: b[:100], r"embeddings\.json cannot be read"),
        ("val-000000.text.npy", None, r"val-000000\.text\.npy is missing"),
        ("val-000000.image.npy", lambda b: b[:-5], r"val-000000\.image\.npy has \d+ bytes, its record says \d+"),
        ("val-000000.items.parquet", lambda b: b + b"x", r"val-000000\.items\.parquet has"),
        ("val-000000.record.json", None, r"val-000000\.record\.json is missing or damaged"),
        ("val-000000.record.json", lambda b: b.replace(b'"model": "', b'"model": "0'), "is missing or damaged"),
    ],
)
def test_missing_and_cut_files_are_named(
    name: str, change: Callable[[bytes], bytes] | None, said: str, features: tuple[Path, Path], tmp_path: Path
) -> None:
    run, data = features
    whole(run, tmp_path / "emb", data=data, splits="val")
    path = tmp_path / "emb" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadInput, match=said):
        EmbeddingSet.open(tmp_path / "emb")


def test_files_of_the_right_size_with_something_else_are_named(features: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = features
    made = whole(run, tmp_path / "emb", data=data, splits="val")
    for name, read in (("image.npy", lambda: made.vectors("image", 0)), ("items.parquet", lambda: made.items(0))):
        path = tmp_path / "emb" / f"val-000000.{name}"
        path.write_bytes(b"x" * path.stat().st_size)
        with pytest.raises(BadInput, match=rf"val-000000\.{name} (cannot be read|is damaged)"):
            read()


def test_a_run_on_raw_data_takes_no_features(tmp_path: Path) -> None:
    run, _ = raw_run(tmp_path)
    data = make_features(tmp_path / "features")
    with pytest.raises(BadInput, match=r"are features of 12 numbers, those that .* was trained on are raw"):
        embedded(run, tmp_path / "emb", data=data)
    make_raw(tmp_path / "more_classes", classes=5)
    assert whole(run, tmp_path / "emb", data=tmp_path / "more_classes", splits="test").manifest.classes[-1] == "class 4"
