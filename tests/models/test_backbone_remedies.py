"""What sentences on backbones and their weights say to do leads out: a wrong setting, its sentence, and what follows
that advice."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import BoW, StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.config.presets import preset
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.errors import BadInput
from cmgan_dist.models.backbone import raw_texts, stored_features
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone
from cmgan_dist.models.generator import build_generator
from cmgan_dist.models.vocabulary import Vocabulary
from tests.models.clip_cases import NAME, stored_clip
from tests.models.text_cases import WORDS, stored_sentence_encoder

IMAGE = {"name": "test_efficientnet", "image_size": 32}
CLIP = f"open_clip:{NAME}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of several kinds."""
    place = tmp_path_factory.mktemp("weights")
    stored_clip(place / "clip")
    stored_sentence_encoder(place / "sentence")
    SentenceTransformer(modules=[BoW(vocab=WORDS)], device="cpu").save(str(place / "words"))
    static = StaticEmbedding(Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), embedding_dim=4)
    SentenceTransformer(modules=[static], device="cpu").save(str(place / "static"))
    state = timm.create_model(IMAGE["name"], num_classes=0).state_dict()
    torch.save(state, place / "image.pth")
    torch.save({k: v.to(torch.int8) for k, v in state.items()}, place / "quantised.pth")
    torch.save({k: v.to_sparse() if v.ndim else v for k, v in state.items()}, place / "sparse.pth")
    for number, odd in enumerate(("_blocks.foo.bar", "_blocks.3")):
        torch.save({"_conv_stem.weight": torch.zeros(1), odd: torch.zeros(1)}, place / f"odd-{number}.pth")
    torch.save({"classifier.6.weight": torch.zeros(1), "classifier.0.weight": torch.zeros(3, 5)}, place / "odd-vgg.pth")
    (place / "words.txt").write_text("".join(f"{word} 1 2 3\n" for word in WORDS))
    (place / "other-words.txt").write_text("aardvark 1 2 3\n")
    (place / "nan-words.txt").write_text("".join(f"{word} 1 nan 3\n" for word in WORDS))
    (place / "odd-words.txt").write_text(f"{WORDS[0]} 1 2 3\n{WORDS[1]} 1 2\n")
    (place / "words.txt.gz").write_bytes(gzip.compress((place / "words.txt").read_bytes())[:-9])
    (place / "text.pth").write_text("no weights")
    (place / "image.safetensors").mkdir()
    (place / "empty").mkdir()
    described = json.loads((place / "clip" / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["hf_model_name"] = "owner/name"
    for name, text in (("bare", None), ("foreign", json.dumps(described)), ("damaged", "{")):
        shutil.copytree(place / "clip", place / name)
        (place / name / "open_clip_config.json").unlink()
        if text:
            (place / name / "open_clip_config.json").write_text(text)
    shutil.copytree(place / "clip", place / "no-weights")
    for path in (place / "no-weights").iterdir():
        if path.suffix in (".safetensors", ".pt"):
            path.unlink()
    shutil.copytree(place / "sentence", place / "half")
    next((place / "half").rglob("model.safetensors")).write_bytes(b"damaged")
    return place


def image(place: Path, **fields: Any) -> None:
    weights = fields.get("weights", "")
    fields["weights"] = str(place / weights) if weights and ":" not in weights else weights
    build_image_backbone(ImageBackboneConfig(**IMAGE | fields))


def text(place: Path, **fields: Any) -> None:
    weights = fields["weights"]
    fields["weights"] = weights if weights.startswith("hub") else str(place / weights)
    build_text_backbone(TextBackboneConfig(**fields), vocabulary=Vocabulary(WORDS))


OF_MODEL = "name the model that these weights are of"
FITS = f"does not fit the model .*{OF_MODEL}"
CNN = {"name": "cnn", "weights": "words.txt", "word_dim": 3}
CASES: list[tuple[Callable[..., None], dict[str, Any], str, dict[str, Any]]] = [
    (image, {"name": "test_eficientnet"}, "did you mean test_efficientnet", IMAGE),
    (image, {"name": "test_vit", "image_size": 17}, "cannot take it .*: set another", {"name": "test_vit"}),
    (
        image,
        {"name": "xcit_nano_12_p16_224", "image_size": 8},
        "timm cannot make .*: set another model.image.image_size than 8, or name another model",
        {"name": "xcit_nano_12_p16_224", "image_size": 32},
    ),
    (image, {"weights": "none.pth"}, r"give a \.pth or \.safetensors file", {"weights": "image.pth"}),
    (image, {"weights": "package:__main__"}, "no package '__main__'.*or name other", {"weights": "image.pth"}),
    (image, {"name": "test_vit", "weights": "image.pth"}, FITS, {"weights": "image.pth"}),
    (image, {"weights": "quantised.pth"}, rf"holds torch\.int8, .*{OF_MODEL}", {"weights": "image.pth"}),
    (image, {"weights": "sparse.pth"}, rf"torch\.sparse_coo.*{OF_MODEL}", {"weights": "image.pth"}),
    (image, {"weights": "odd-0.pth"}, FITS, {"weights": "image.pth"}),
    (image, {"weights": "odd-1.pth"}, FITS, {"weights": "image.pth"}),
    (image, {"name": "vgg11", "weights": "odd-vgg.pth"}, FITS, {"weights": "image.pth"}),
    (
        text,
        {"name": "sentence", "weights": "sentence", "max_tokens": 2},
        "so that no word is left: set it to 3 or more",
        {"name": "sentence", "weights": "sentence", "max_tokens": 3},
    ),
    (
        text,
        {"name": CLIP, "weights": "clip", "max_tokens": 1},
        "so that no word is left: set it to 3 or more",
        {"name": CLIP, "weights": "clip", "max_tokens": 3},
    ),
    (
        text,
        {"name": CLIP, "weights": "clip", "pools": ("max",)},
        "has its own pooling: set it to sentence",
        {"name": CLIP, "weights": "clip", "pools": ("sentence",)},
    ),
    (
        text,
        {"name": "sentence", "weights": "static"},
        "is a StaticEmbedding, whose texts cannot be cut .*: name a transformer",
        {"name": "sentence", "weights": "sentence"},
    ),
    (
        text,
        {"name": "sentence", "weights": "words", "pools": ("cls",)},
        "makes no features of tokens: set it to sentence",
        {"name": "sentence", "weights": "words", "pools": ("sentence",)},
    ),
    (
        text,
        {"name": "sentence", "weights": "words", "trainable": True, "checkpoint": True},
        "has no layers that can be checkpointed: set it to false",
        {"name": "sentence", "weights": "words", "trainable": True, "checkpoint": False},
    ),
    (
        text,
        {"name": "sentence", "weights": "sentence", "pools": ("max", "max")},
        "name one or more pools, each once",
        {"name": "sentence", "weights": "sentence", "pools": ("max",)},
    ),
    (
        text,
        {"name": "cnn", "weights": "words.txt"},
        "have 3 numbers: set it to 3",
        {"name": "cnn", "weights": "words.txt", "word_dim": 3},
    ),
    *[
        (text, {"name": "cnn", "weights": wrong, "word_dim": 3}, sentence, CNN)
        for wrong, sentence in (
            ("none.txt", "cannot be read .*: name another file or get it again"),
            ("words.txt.gz", "cannot be read .*: name another file or get it again"),
            ("odd-words.txt", "odd-words.txt: .*: get the file again"),
            ("nan-words.txt", "holds NaN or Inf: get the file again"),
            ("other-words.txt", "have none of the 7 words of the texts: name another file"),
        )
    ],
    *[
        (text, {"name": CLIP, "weights": wrong}, sentence, {"name": CLIP, "weights": right})
        for wrong, sentence, right in (
            ("bare", "has no open_clip_config.json: give the file of the weights", "bare/weights.pt"),
            ("damaged", "open_clip_config.json cannot be used .*: restore it", "clip"),
            ("foreign", r"is of a hub \(owner/name\): give another model", "clip"),
            ("no-weights", "would be random: put the weights there, or give their file", "clip/weights.pt"),
            ("none", "does not exist: give a file, a folder with open_clip_config.json", "clip"),
            ("text.pth", "name the model that these weights are of, or get them again", "clip/weights.pt"),
            ("hub:laion", f"for {NAME} the hub has none: name a file", "clip/weights.pt"),
        )
    ],
    (
        text,
        {"name": "open_clip:cmgan-tini", "weights": "clip/weights.pt"},
        f"is not a model of open_clip: did you mean {NAME}",
        {"name": CLIP, "weights": "clip/weights.pt"},
    ),
    *[
        (text, {"name": "sentence", "weights": wrong}, sentence, {"name": "sentence", "weights": "sentence"})
        for wrong, sentence in (
            ("empty", "which is not the folder of a sentence-transformers model: give such a folder"),
            ("half", "cannot be loaded .*: restore its files, or name another model"),
        )
    ],
    (image, {"weights": "text.pth"}, "is not a file of weights .*: get it again", {"weights": "image.pth"}),
    (image, {"weights": "image.safetensors"}, r"is no file: give a \.pth or", {"weights": "image.pth"}),
    (image, {"weights": "package:numpy"}, "carries 0 files .*: give the path of the file", {"weights": "image.pth"}),
    (
        image,
        {"name": "selecsls42", "image_size": 64, "trainable": True, "checkpoint": True},
        "timm has no activation checkpointing for selecsls42: set it to false",
        {"name": "selecsls42", "image_size": 64, "trainable": True, "checkpoint": False},
    ),
    (image, {"name": "features"}, "the data holds raw images: name an image backbone", IMAGE),
    (
        image,
        {"name": CLIP, "weights": "clip", "image_size": 36},
        "whole patches of 8 pixels: set it to 32 or 40",
        {"name": CLIP, "weights": "clip", "image_size": 40},
    ),
    (
        text,
        {"name": "features", "weights": ""},
        "the data holds raw texts: name a text backbone",
        {"name": "sentence", "weights": "sentence"},
    ),
    (
        text,
        {"name": "cmn", "weights": ""},
        "expected features, cnn, sentence or open_clip:MODEL",
        {"name": "sentence", "weights": "sentence"},
    ),
]


@pytest.mark.parametrize(("build", "wrong", "sentence", "right"), CASES)
def test_a_backbone(
    build: Callable[..., None], wrong: dict[str, Any], sentence: str, right: dict[str, Any], place: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        build(place, **wrong)
    build(place, **right)


def test_a_vocabulary(tmp_path: Path) -> None:
    path, right = tmp_path / "vocabulary.json", Vocabulary(WORDS).to_json()
    for wrong, sentence in (
        (None, "cannot be read .*: restore it or train again"),
        ("{", "is not a vocabulary .*: restore it or train again"),
        (right.replace('"words"', '"words of"'), "is not a vocabulary .*: restore it or train again"),
        (right.replace('"version": ', '"version": 1'), "has version 11, this program reads 1: train again"),
        (right.replace('"green"', '"red"'), "must be a list of different strings: restore it or train again"),
    ):
        if wrong is not None:
            path.write_text(wrong)
        with pytest.raises(BadInput, match=sentence):
            Vocabulary.load(path)
        path.write_text(right)
        assert Vocabulary.load(path).words == WORDS


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_backbone_that_does_not_fit_the_data(modality: str) -> None:
    raw, features = DataSpec(["a"], "single", None, None), DataSpec(["a"], "single", 5, 4)
    config = preset("smoke").model
    config.image, config.text = ImageBackboneConfig(name="features"), TextBackboneConfig(name="features")
    build_generator(config, features, None)
    setattr(config, modality, ImageBackboneConfig(**IMAGE) if modality == "image" else TextBackboneConfig(name="cnn"))
    with pytest.raises(BadInput, match=rf"model\.{modality}\.name is .*: set it to features"):
        build_generator(config, features, None)
    getattr(config, modality).name = "features"
    build_generator(config, features, None)
    with pytest.raises(BadInput, match="holds raw images: name a backbone of images, or write features with"):
        build_generator(config, raw, None)
    config.image, config.text = ImageBackboneConfig(**IMAGE), TextBackboneConfig(name="cnn")
    build_generator(config, raw, Vocabulary(WORDS))


def test_a_network_of_words_without_a_vocabulary() -> None:
    with pytest.raises(BadInput, match="needs a vocabulary: build one from the training texts"):
        build_text_backbone(TextBackboneConfig(name="cnn"))
    build_text_backbone(TextBackboneConfig(name="cnn"), vocabulary=Vocabulary.build(WORDS))


def test_items_of_the_other_kind() -> None:
    with pytest.raises(BadInput, match="the texts are raw: name a text backbone"):
        stored_features(WORDS)
    assert raw_texts(WORDS) == WORDS
    with pytest.raises(BadInput, match="the texts are features: set it to features"):
        raw_texts(torch.zeros(1, 3))
    assert stored_features(torch.zeros(1, 3)).shape == (1, 3)
