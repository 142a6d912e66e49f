"""best/: there and back, whole whenever a save is killed, checked file by file; frozen backbones are found again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from cmgan_dist.config.fields import Config
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.errors import BadInput
from cmgan_dist.models import saved as saved_module
from cmgan_dist.models.backbones import TimmBackbone
from cmgan_dist.models.generator import Generator, build_generator
from cmgan_dist.models.saved import (
    BackboneSpec,
    ModelSpec,
    check_shapes,
    describe_model,
    keep_weights,
    load_backbone,
    load_generator,
    read_model,
    save_model,
    stored_tensors,
)
from cmgan_dist.models.scoring import Scoring, ScoringSpec, Shares
from cmgan_dist.models.vocabulary import Vocabulary
from tests.toy import small_config

FEATURES = DataSpec(["cat", "dog"], "single", 6, 5)
RAW = DataSpec(["cat", "dog"], "single", None, None)
SCORING = Scoring(
    ScoringSpec("pair", {}, {"pair": Shares()}, standardise=True),
    {f"{m}_{name}": torch.rand(8, dtype=torch.float64) for m in ("image", "text") for name in ("mean", "std")},
    multi_label=False,
)


def save(best: Path, seed: int = 0, **options: object) -> Generator:
    """A small generator on features, saved into `best`."""
    torch.manual_seed(seed)
    config = small_config(10)
    generator = build_generator(config.model, FEATURES, None)
    spec = describe_model(config, FEATURES, generator, "toy", "nobody's", {})
    save_model(best, spec, config, stored_tensors(generator), progress={"position": seed}, **options)  # type: ignore[arg-type]
    return generator


def raw_config() -> Config:
    """A small timm model, frozen at random weights, and a text CNN."""
    config = small_config(10, model__share_layers=False)
    config.model.image.name, config.model.image.image_size = "test_efficientnet", 32
    config.model.text.name, config.model.text.channels = "cnn", 4
    return config


def save_raw(best: Path, config: Config) -> Generator:
    vocabulary = Vocabulary(["a", "red", "dog"])
    generator = build_generator(config.model, RAW, vocabulary)
    spec = describe_model(config, RAW, generator, "toy", "", {})
    keep_weights(best, spec)
    save_model(best, spec, config, stored_tensors(generator), progress={}, vocabulary=vocabulary)
    return generator


def test_there_and_back_in_eval_mode(tmp_path: Path) -> None:
    made = save(tmp_path / "run" / "best", scoring=SCORING)
    for where in (tmp_path / "run", str(tmp_path / "run" / "best")):
        saved = read_model(where)
        found = load_generator(saved)
        assert not found.training
        assert all(torch.equal(v, found.state_dict()[k]) for k, v in made.state_dict().items())
        assert (saved.spec.data, saved.spec.image.name, saved.spec.image.dim) == (FEATURES, "features", 6)
        assert saved.config == small_config(10)
        assert saved.scoring.spec == SCORING.spec
        ours, theirs = saved.scoring.tensors(), SCORING.tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    rows = torch.randn(9, 6)
    parts = torch.cat([found.project_images(rows[:4]), found.project_images(rows[4:])])
    torch.testing.assert_close(found.project_images(rows), parts)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, scoring=SCORING)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("step", range(7))
def test_a_save_killed_anywhere_leaves_one_whole_model(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is written or gets its name in one call of os.replace; the save dies at the step-th."""
    before = save(tmp_path, seed=1)
    replace, calls = os.replace, iter(range(100))

    def dying(source: object, target: object) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", dying)
    try:
        after = save(tmp_path, seed=2)
    except KeyboardInterrupt:
        after = None
    monkeypatch.undo()
    saved = read_model(tmp_path)
    found = load_generator(saved).state_dict()
    expected = before if saved.spec.progress["position"] == 1 else build(seed=2)
    assert all(torch.equal(v, found[k]) for k, v in expected.state_dict().items())
    assert (saved.spec.progress["position"] == 2) == (step > 2)
    assert (after is not None) == (step > 4)


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("second", range(6))
def test_two_saves_killed_one_after_the_other_leave_one_whole_model(
    first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins by ending the first, whose tensors may lie in a file that it would write over."""
    save(tmp_path, seed=1)
    replace = os.replace
    for seed, step in ((2, first), (3, second)):
        calls = iter(range(100))

        def dying(source: object, target: object, calls: Iterator[int] = calls, step: int = step) -> None:
            if next(calls) == step:
                raise KeyboardInterrupt
            replace(source, target)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "replace", dying)
        with contextlib.suppress(KeyboardInterrupt):
            save(tmp_path, seed=seed)
        monkeypatch.undo()
    saved = read_model(tmp_path)
    found, expected = load_generator(saved).state_dict(), build(saved.spec.progress["position"]).state_dict()
    assert all(torch.equal(v, found[k]) for k, v in expected.items())


def test_every_flipped_bit_of_model_json_is_found(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with contextlib.suppress(BadInput):
            saved = read_model(tmp_path)
            pytest.fail(f"byte {at} was taken as {saved.spec}")


def build(seed: int) -> Generator:
    torch.manual_seed(seed)
    return build_generator(small_config(10).model, FEATURES, None)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "config.yaml"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty", "folder"])
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path / "best")
    path = tmp_path / "best" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(BadInput, match=name):
        read_model(tmp_path)


def test_no_run_and_no_model_are_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run folder .* does not exist"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"has no best/model\.json: train it first"):
        read_model(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | {"version": 7}))
    with pytest.raises(BadInput, match="has version 7, this program reads 1"):
        read_model(tmp_path)


def test_random_frozen_backbones_and_the_cnn_come_back(tmp_path: Path) -> None:
    made = save_raw(tmp_path, raw_config()).eval()
    torch.manual_seed(99)
    saved = read_model(tmp_path)
    found = load_generator(saved)
    image, texts = torch.randint(0, 255, (3, 32, 32, 4), dtype=torch.uint8), ["a red dog", "red", "blue a"]
    features = made.image_backbone(image)
    assert torch.equal(found.image_backbone(image), features)
    assert torch.equal(load_backbone(saved, "image")(image), features)
    tokens = made.text_backbone.tokenise(texts)
    alone = load_backbone(saved, "text")
    assert torch.equal(alone(alone.tokenise(texts)), made.text_backbone(tokens))  # type: ignore[operator]
    core = load_generator(saved, backbones=False)
    assert torch.equal(core.project_images(features), made.project_images(features))
    assert saved.spec.image.image_size == 32
    assert saved.spec.image.mean == list(timm.get_pretrained_cfg_value("test_efficientnet", "mean"))


def test_weights_of_a_file_are_kept_and_checked(tmp_path: Path) -> None:
    weights = tmp_path / "mine.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    config = raw_config()
    config.model.image.weights = str(weights)
    made = save_raw(tmp_path / "best", config)
    weights.unlink()
    shutil.move(tmp_path / "best", tmp_path / "elsewhere")
    saved = read_model(tmp_path / "elsewhere")
    assert not any(k.startswith("image_backbone.") for k in load_file(tmp_path / "elsewhere" / "model.safetensors"))
    image = torch.randint(0, 255, (2, 32, 32, 4), dtype=torch.uint8)
    for backbone in (load_generator(saved).image_backbone, load_backbone(saved, "image")):
        assert torch.equal(backbone(image), made.image_backbone(image))
    kept = tmp_path / "elsewhere" / "backbones" / "image" / "mine.pth"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"mine\.pth is damaged"):
        load_backbone(saved, "image")


def test_kept_weights_follow_the_source_and_outlive_it(tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        source, best = tmp_path / kind, tmp_path / f"best of {kind}"
        spec = ModelSpec(RAW, BackboneSpec("x", 3), BackboneSpec("x", 3, weights=str(source)))
        for content in ("first", "second"):  # a run that is resumed after the weights were replaced
            if kind == "folder":
                source.mkdir(exist_ok=True)
            (source / "config.json" if kind == "folder" else source).write_text(content)
            spec.text.weights = str(source)
            keep_weights(best, spec)
            kept = best / "backbones" / "text" / kind
            assert (kept / "config.json" if kind == "folder" else kept).read_text() == content
        source.rename(tmp_path / f"{kind} gone")
        spec.text.weights, files = str(source), dict(spec.files)
        keep_weights(best, spec)
        assert (spec.text.weights, spec.files) == (f"backbones/text/{kind}", files)
        assert list(files) == [f"backbones/text/{kind}" + "/config.json" * (kind == "folder")]


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "mine.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    config = raw_config()
    config.model.image.weights = str(weights)
    generator = build_generator(config.model, RAW, Vocabulary(["a"]))
    spec = describe_model(config, RAW, generator, "toy", "", {})  # its weights are not copied
    save_model(tmp_path / "best", spec, config, stored_tensors(generator), progress={}, vocabulary=Vocabulary(["a"]))
    torch.save(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    saved = read_model(tmp_path)
    for load in (lambda: load_generator(saved), lambda: load_backbone(saved, "image")):
        with pytest.raises(BadInput, match=r"image backbone test_efficientnet .* is not the one .*SHA-256 differs"):
            load()


def test_features_that_nobody_describes_have_no_backbone(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(BadInput, match="takes text features of 5 numbers and does not say what made them"):
        load_backbone(read_model(tmp_path), "text")


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_module, "write_atomic", full)
    with pytest.raises(BadInput, match=r"best model could not be written .*No space left on device"):
        save(tmp_path)


def test_another_model_is_named() -> None:
    with pytest.raises(BadInput, match=r"another model: w is \[3\], expected \[4\]"):
        check_shapes({"w": torch.zeros(4)}, {"w": torch.zeros(3)}, "RUN")
    with pytest.raises(BadInput, match="another model: it has no v"):
        check_shapes({"v": torch.zeros(4)}, {"w": torch.zeros(3)}, "RUN")
    with pytest.raises(BadInput, match="another model: it has w"):
        check_shapes({}, {"w": torch.zeros(3)}, "RUN")


def test_the_details_of_feature_shards_name_the_backbones(feature_data: Callable[..., Path]) -> None:
    config = small_config(10)
    generator = build_generator(config.model, FEATURES, None)
    made = {"backbone": "resnet18", "weights": "/w.pth", "weights_sha256": "ab", "image_size": 96, "dim": 6}
    spec = describe_model(config, FEATURES, generator, "toy", "", {"image": made})
    assert (spec.image.name, spec.image.weights, spec.image.weights_sha256) == ("resnet18", "/w.pth", "ab")
    assert (spec.image.image_size, spec.text.name) == (96, "features")


def test_a_trained_backbone_is_normalised_as_in_training(tmp_path: Path) -> None:
    """Its weights do not tell: those of efficientnet-lite want other numbers than timm's default."""
    config = raw_config()
    config.model.image.trainable = True
    generator = build_generator(config.model, RAW, Vocabulary(["a"]))
    assert isinstance(generator.image_backbone, TimmBackbone)
    generator.image_backbone.set_normalisation([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    spec = describe_model(config, RAW, generator, "toy", "", {})
    save_model(tmp_path, spec, config, stored_tensors(generator), progress={}, vocabulary=Vocabulary(["a"]))
    saved, image = read_model(tmp_path), torch.randint(0, 255, (3, 32, 32, 4), dtype=torch.uint8)
    expected = generator.eval().image_backbone(image)
    for found in (load_generator(saved).image_backbone, load_backbone(saved, "image")):
        torch.testing.assert_close(found(image), expected)
