"""Exported files: the same vectors as the model's own, by runtimes that know nothing of this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cmgan_dist.errors import BadInput
from cmgan_dist.models.generator import Generator
from cmgan_dist.retrieval import export as export_module
from cmgan_dist.retrieval.model import Model, load_model
from tests.toy import save_untrained, small_config


def settle_statistics(generator: Generator, dims: tuple[int, int]) -> None:
    """Running statistics far from 0 and 1, as after training: folding them wrongly shows."""
    generator.train()
    with torch.no_grad():
        for _ in range(5):
            image, text = (3 * torch.randn(64, dim) + 2 for dim in dims)
            generator.shared(generator.image_encoder(image), generator.text_encoder(text))
    generator.eval()


def trained_model(run: Path, data: Path, mixed: bool = False, **fields: object) -> Model:
    save_untrained(run, data, small_config(8, **fields), mixed=mixed)
    model = load_model(run)
    settle_statistics(model.generator, (12, 7))
    return model


FORMS = [
    {},
    {"model__input_norm": "batch"},
    {"model__input_norm": "l2", "model__share_layers": False},
    {"model__common_activation": False},
    {"mixed": True},
]


@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: " ".join(fields) or "plain")
def test_a_program_is_the_model_for_any_number_of_rows(
    fields: dict[str, object], feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    model = trained_model(tmp_path / "run", feature_data(), **fields)
    paths = model.export(tmp_path / "made" / "mine.pt2")
    assert [p.name for p in paths] == ["mine.image.pt2", "mine.text.pt2"]
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["mine.image.pt2", "mine.text.pt2"]
    for path, dim, encode in zip(paths, (12, 7), (model.encode_images, model.encode_texts), strict=True):
        program = torch.export.load(path).module()
        for rows in (1, 2, 33):
            features = torch.randn(rows, dim) * 3 + 1
            np.testing.assert_allclose(program(features).numpy(), encode(features.numpy()), atol=5e-6)


def test_an_onnx_file_says_what_it_is(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    model = trained_model(tmp_path / "run", feature_data())
    assert model.export(tmp_path / "mine.onnx", modality="text") == [tmp_path / "mine.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "mine.onnx")
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, given.name, given.shape) == (
        "text_features",
        ["rows", 7],
        "text_embeds",
        ["rows", 8],
    )
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    made = session.run(None, {"text_features": features})[0]
    np.testing.assert_allclose(made, model.encode_texts(features), atol=5e-6)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["model_sha256"] == model.saved.spec.files["model.safetensors"]
    assert json.loads(facts["classes"]) == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_backbones_go_into_the_files_too(ending: str, raw_data: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(8)
    config.model.image.name, config.model.image.image_size = "test_efficientnet", 32
    config.model.text.name, config.model.text.channels = "cnn", 4
    data = raw_data()
    save_untrained(tmp_path / "run", data, config)
    model = load_model(tmp_path / "run")
    image, text = model.export(tmp_path / f"mine.{ending}", backbone=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    ids = model.backbone("text").tokenise(["red dog", "a blue boat that is green"])["ids"]  # type: ignore[operator]
    if ending == "pt2":
        seen, read = (
            torch.export.load(path).module()(torch.as_tensor(x)) for path, x in ((image, pixels), (text, ids))
        )
    else:
        seen = onnxruntime.InferenceSession(image).run(None, {"pixels": pixels})[0]
        read = onnxruntime.InferenceSession(text).run(None, {"input_ids": ids.numpy()})[0]
    pictures = [p.transpose(1, 2, 0) for p in pixels]
    np.testing.assert_allclose(np.asarray(seen), model.encode_images(pictures), atol=1e-5)
    expected = model.encode_texts(["red dog", "a blue boat that is green"])
    np.testing.assert_allclose(np.asarray(read), expected, atol=1e-5)


def test_a_file_that_differs_from_the_model_is_refused_and_removed(
    feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_model(tmp_path / "run", feature_data())
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.image.pt2").write_text("an earlier export")
    folded = export_module.FoldedProjection.forward

    def off(self: export_module.FoldedProjection, features: torch.Tensor) -> torch.Tensor:
        return folded(self, features) + 1e-4 * (self.hidden.in_features == 7)  # the text part alone

    monkeypatch.setattr(export_module.FoldedProjection, "forward", off)
    with pytest.raises(BadInput, match=r"mine\.text\.pt2: .* differs from the model by \d\.\de-04"):
        model.export(tmp_path / "made" / "mine.pt2")
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["mine.image.pt2"]
    assert (tmp_path / "made" / "mine.image.pt2").read_text() == "an earlier export"


def test_what_cannot_be_exported_is_said_in_one_sentence(
    feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_model(tmp_path / "run", feature_data())
    with pytest.raises(BadInput, match=r"mine\.pth ends in '\.pth': name a file that ends in \.onnx or \.pt2"):
        model.export(tmp_path / "mine.pth")
    with pytest.raises(BadInput, match="takes image features of 12 numbers and does not say what made them"):
        model.export(tmp_path / "mine.pt2", backbone=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/mine\.pt2 cannot be written"):
        model.export(tmp_path / "file" / "mine.pt2")
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs the package onnx: pip install 'cmgan-dist\[export\]'"):
        model.export(tmp_path / "mine.onnx")


def test_what_cannot_be_traced_is_said_in_one_sentence(
    feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_model(tmp_path / "run", feature_data())

    def branches(self: export_module.FoldedProjection, features: torch.Tensor) -> torch.Tensor:
        return features if features.sum() > 0 else -features

    monkeypatch.setattr(export_module.FoldedProjection, "forward", branches)
    with pytest.raises(BadInput, match=r"the image part cannot be traced .*: export it from features"):
        model.export(tmp_path / "mine.pt2")
    assert not list(tmp_path.glob("mine*"))
