"""Towers of CLIP-family models make what open_clip's own model makes, and are kept, loaded and refused as backbones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.errors import BadInput
from cmgan_dist.models.backbone import PixelBackbone, TextBackbone
from cmgan_dist.models.backbones import (
    build_image_backbone,
    build_text_backbone,
    image_size_of,
    text_features,
)
from cmgan_dist.models.generator import build_generator
from cmgan_dist.models.saved import (
    describe_model,
    keep_weights,
    load_backbone,
    load_generator,
    read_model,
    save_model,
    stored_tensors,
)
from cmgan_dist.models.weights import weights_sha256
from tests.models.clip_cases import MEAN, NAME, STD, stored_clip
from tests.toy import small_config

TEXTS = ["a dog", "a photograph of two cats that sleep on a sofa", "", "owl " * 100]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return stored_clip(tmp_path_factory.mktemp("clip"))


def image_config(weights: object, **more: Any) -> ImageBackboneConfig:
    return ImageBackboneConfig(f"open_clip:{NAME}", str(weights), image_size=32, **more)


def text_config(weights: object, **more: Any) -> TextBackboneConfig:
    return TextBackboneConfig(f"open_clip:{NAME}", str(weights), **more)


@pytest.mark.parametrize("form", ["weights.pt", "open_clip_model.safetensors", "."])
def test_both_towers_make_what_the_library_makes(stored: tuple[Path, Any], form: str) -> None:
    folder, model = stored
    mean, std = (MEAN, STD) if form == "." else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    image = build_image_backbone(image_config(folder / form))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    scaled = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    text = build_text_backbone(text_config(folder / form, max_tokens=77))
    with torch.no_grad():
        torch.testing.assert_close(image(pixels), model.encode_image(scaled), rtol=1e-5, atol=1e-5)
        expected = model.encode_text(open_clip.tokenize(TEXTS))
        torch.testing.assert_close(text(text.tokenise(TEXTS)), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(text_features(text, TEXTS, "cpu", size=2), expected, rtol=1e-5, atol=1e-5)
    assert (image.dim, text.dim, image.random, text.random) == (12, 12, False, False)


def test_a_batch_is_as_long_as_its_longest_text_and_long_ones_are_cut(stored: tuple[Path, Any]) -> None:
    text = build_text_backbone(text_config(stored[0], max_tokens=16))
    assert text.tokenise(["a dog"])["ids"].shape == (1, 4)  # type: ignore[index]
    ids = text.tokenise(TEXTS)["ids"]  # type: ignore[index]
    assert ids.shape == (4, 16)
    assert ids[3, -1] == open_clip.tokenize("a")[0].max(), "the end token stays"
    assert text.lengths(TEXTS) == [4, 12, 2, 16]


def test_a_trained_tower_gets_gradients_and_saves_memory_alike(stored: tuple[Path, Any]) -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    gradients = []
    for checkpoint in (False, True):
        image = build_image_backbone(image_config(stored[0], trainable=True, checkpoint=checkpoint)).train()
        text = build_text_backbone(text_config(stored[0], trainable=True, checkpoint=checkpoint)).train()
        (F.normalize(image(pixels), dim=1) * F.normalize(text(text.tokenise(TEXTS[:2])), dim=1)).sum().backward()
        gradients.append([p.grad for module in (image, text) for p in module.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_frozen_tower_has_no_gradient_and_a_checksum_of_its_weights(stored: tuple[Path, Any]) -> None:
    first, again = (build_image_backbone(image_config(stored[0])) for _ in range(2))
    assert isinstance(first, PixelBackbone)
    assert not first(torch.zeros(1, 3, 32, 32)).requires_grad
    assert weights_sha256(first) == weights_sha256(again)
    assert build_image_backbone(image_config("")).random


def test_a_picture_that_patches_do_not_fill_is_refused(stored: tuple[Path, Any]) -> None:
    with pytest.raises(BadInput, match=r"image_size is 36, .* whole patches of 8 pixels: set it to 32 or 40"):
        build_image_backbone(replace(image_config(stored[0]), image_size=36))
    build_image_backbone(replace(image_config(stored[0]), image_size=40))


def test_the_size_that_a_model_is_made_for(stored: tuple[Path, Any]) -> None:
    made = {"test_vit": 160, "vit_base_patch16_clip_384": 384, "open_clip:ViT-L-14-336": 336, "nothing": None}
    made |= {"open_clip:ViT-SO400M-14-SigLIP-384": 384, "tf_efficientnet_lite0": None, "vgg19": None}
    assert {name: image_size_of(ImageBackboneConfig(name)) for name in made} == made
    assert image_size_of(image_config(stored[0])) == 32


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (image_config("nowhere.pt"), "nowhere.pt does not exist"),
        (image_config("hub:laion"), "hub:laion"),
        (replace(image_config(""), name="open_clip:ViT-B-3"), "ViT-B-32"),
        (replace(image_config("EMPTY")), "has no open_clip_config.json"),
        (replace(image_config("BARE")), "holds no .safetensors, .bin, .pth"),
        (text_config("BARE"), "holds no .safetensors, .bin, .pth"),
        (replace(image_config("OTHER")), "name the model that these weights are of"),
        (replace(image_config("OTHER")), "Missing key(s) in state_dict: "),
        (text_config("", pools=("max",)), "model.text.pools"),
        (replace(image_config("hub:x"), name="open_clip:ViT-B-32"), "hub:laion2b_s34b_b79k"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    stored: tuple[Path, Any], config: ImageBackboneConfig | TextBackboneConfig, said: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "bare").mkdir()
    for name in ("open_clip_config.json", "weights.pt"):  # a suffix that open_clip passes over in folders
        (tmp_path / "bare" / name).write_bytes((stored[0] / name).read_bytes())
    places = {"BARE": str(tmp_path / "bare"), "EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other.pt")}
    config = replace(config, weights=places.get(config.weights, config.weights))
    with pytest.raises(BadInput) as found:
        build_image_backbone(config) if isinstance(config, ImageBackboneConfig) else build_text_backbone(config)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("change", [{}, {"hf_model_name": "a/b"}])
def test_code_in_a_folder_from_elsewhere_is_not_run(change: dict[str, str], tmp_path: Path) -> None:
    folder, _ = stored_clip(tmp_path / "clip")
    record = json.loads((folder / "open_clip_config.json").read_text())
    asked = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    record["model_cfg"]["text_cfg"] |= asked | change
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    planted = tmp_path / "planted"
    (folder / "tok.py").write_text(f"open({str(planted)!r}, 'w').close()\nclass Tok: pass\n")
    mapped = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", "tok.Tok"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(mapped))
    (folder / "config.json").write_text(json.dumps({"model_type": "tok", **mapped}))
    with pytest.raises(BadInput, match=r"model\.text"):
        build_text_backbone(text_config(folder))
    assert not planted.exists()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_saved_model_outlives_the_folder_of_its_towers(trainable: bool, tmp_path: Path) -> None:
    folder, _ = stored_clip(tmp_path / "clip")
    config = small_config(10)
    config.model.image = image_config(folder, trainable=trainable)
    config.model.text = text_config(folder, trainable=trainable)
    data = DataSpec(["cat", "dog"], "single", None, None)
    generator = build_generator(config.model, data, None).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(1.0 if not trainable else 1.01)
    spec = describe_model(config, data, generator, "toy", "", {})
    keep_weights(tmp_path / "best", spec)
    save_model(tmp_path / "best", spec, config, stored_tensors(generator), progress={})
    folder.rename(tmp_path / "gone")
    saved, pixels = read_model(tmp_path), torch.randint(0, 256, (2, 32, 32, 4), dtype=torch.uint8)
    loaded = load_generator(saved)
    for image, text in (
        (loaded.image_backbone, loaded.text_backbone),
        (load_backbone(saved, "image"), load_backbone(saved, "text")),
    ):
        torch.testing.assert_close(image(pixels), generator.image_backbone(pixels))
        assert isinstance(text, TextBackbone)
        own = generator.text_backbone
        torch.testing.assert_close(text(text.tokenise(TEXTS)), own(own.tokenise(TEXTS)))
