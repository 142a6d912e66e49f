"""What sentences on backbones and their weights say to do leads out: a wrong setting, its sentence, and what follows
that advice."""

from __future__ import annotations

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
from cmgan_dist.errors import BadInput
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone
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
    return place


def image(place: Path, **fields: Any) -> None:
    weights = fields.get("weights", "")
    fields["weights"] = str(place / weights) if weights.endswith(".pth") else weights
    build_image_backbone(ImageBackboneConfig(**IMAGE | fields))


def text(place: Path, **fields: Any) -> None:
    fields["weights"] = str(place / fields["weights"])
    build_text_backbone(TextBackboneConfig(**fields), vocabulary=Vocabulary(WORDS))


OF_MODEL = "name the model that these weights are of"
FITS = f"does not fit the model .*{OF_MODEL}"
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
