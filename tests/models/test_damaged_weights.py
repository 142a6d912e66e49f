"""Files that backbones are made of, and their copies in best/, missing, damaged or out of reach: one sentence, or the
same model as before. None of them runs code."""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.data.manifest import DataSpec, load_manifest
from cmgan_dist.errors import BadInput
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone, text_features
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
from cmgan_dist.models.vocabulary import Vocabulary, load_word_vectors
from cmgan_dist.models.weights import read_weights
from tests.launchers.damage_cases import DAMAGES, TRACE, Damage, Planted, as_nobody, flipped, forbidden, no_utf8
from tests.models.text_cases import WORDS, stored_sentence_encoder
from tests.toy import make_raw, small_config

IMAGE = "test_efficientnet"
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS]


def vectors() -> bytes:
    return b"".join(f"{word} {i / 7} {i / 9} 0.25\n".encode() for i, word in enumerate(WORDS))


def binary_vectors() -> bytes:
    rows = [word.encode() + b" " + torch.full([3], float(i)).numpy().tobytes() for i, word in enumerate(WORDS)]
    return b"%d 3\n" % len(WORDS) + b"".join(rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of every kind, and the best/ of a sentence encoder and of a CNN that have copies of them."""
    place = tmp_path_factory.mktemp("weights")
    stored_sentence_encoder(place / "sentence")
    torch.manual_seed(0)
    state = timm.create_model(IMAGE).state_dict()
    save_file(state, place / "image.safetensors")
    torch.save(state, place / "image.pth")
    (place / "words.txt").write_bytes(vectors())
    (place / "words.txt.gz").write_bytes(gzip.compress(vectors(), mtime=0))
    (place / "words.bin").write_bytes(binary_vectors())
    make_raw(place / "data", counts={"train": 8})
    for name, weights in (("sentence", "sentence"), ("cnn", "words.txt")):
        config = small_config(8, model__image=ImageBackboneConfig(IMAGE, str(place / "image.pth"), image_size=32))
        config.model.text = TextBackboneConfig(name, str(place / weights), word_dim=3, trainable=False)
        config.data = str(place / "data")
        spec = DataSpec.of(manifest := load_manifest(place / "data"))
        vocabulary = Vocabulary(WORDS) if name == "cnn" else None
        generator = build_generator(config.model, spec, vocabulary)
        described = describe_model(config, spec, generator, manifest.name, "", manifest.details)
        best = place / f"{name}-run" / "best"
        keep_weights(best, described)
        save_model(best, described, config, stored_tensors(generator), progress={}, vocabulary=vocabulary)
    return place


def text_of(place: Path) -> Any:
    config = TextBackboneConfig("sentence", str(place / "sentence"))
    return text_features(build_text_backbone(config), TEXTS, "cpu")


def image_of(weights: Path) -> Any:
    return build_image_backbone(ImageBackboneConfig(IMAGE, str(weights), image_size=32)).eval()(
        torch.zeros(1, 3, 32, 32)
    )


def saved_of(run: Path) -> Any:
    saved = read_model(run)
    texts = text_features(load_backbone(saved, "text"), TEXTS, "cpu")
    load_backbone(saved, "image")
    load_generator(saved)
    return texts


READERS: dict[str, Callable[[Path], Any]] = {
    "sentence/*": text_of,
    "image.pth": lambda place: image_of(place / "image.pth"),
    "image.safetensors": lambda place: image_of(place / "image.safetensors"),
    "words.txt": lambda place: load_word_vectors(place / "words.txt", WORDS)[0],
    "words.txt.gz": lambda place: load_word_vectors(place / "words.txt.gz", WORDS)[0],
    "words.bin": lambda place: load_word_vectors(place / "words.bin", WORDS)[0],
    "sentence-run/best/**/*": lambda place: saved_of(place / "sentence-run"),
    "cnn-run/best/**/*": lambda place: saved_of(place / "cnn-run"),
}
NO_SUMS = {"image.safetensors", "words.txt", "words.bin", "sentence/*"}
"""Files of others that have no checksum of themselves: with another byte they may be another model, which works."""
QUICK = {"image.pth", "words.txt", "words.txt.gz", "words.bin"}


def result_of(reader: Callable[[Path], Any], place: Path) -> Any:
    """What a reader gives, or its sentence."""
    try:
        return reader(place)
    except BadInput as error:
        return str(error)


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in READERS])
def test_weights_that_are_not_as_they_were(name: str, damage: Damage, whole: Path, tmp_path: Path) -> None:
    expected = READERS[name](whole)
    pattern = name if name != "sentence/*" else "sentence/**/*"
    files = [path.relative_to(whole) for path in sorted(whole.glob(pattern)) if path.is_file()]
    assert files
    for file in files:
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        damage(place / file)
        with as_nobody(place) if damage is forbidden else contextlib.nullcontext():
            found = result_of(READERS[name], place)
        assert not list(place.rglob(TRACE))
        if isinstance(found, str):
            assert str(place) in found, f"{file} {damage.__name__}: {found}"
            assert len(found.replace(str(place), "")) < 400
            assert "\n" not in found
        elif name not in NO_SUMS or damage not in (flipped, no_utf8):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), f"{file} {damage.__name__}"


def test_a_tokeniser_without_words_and_one_of_another_model_are_refused(whole: Path, tmp_path: Path) -> None:
    """transformers makes an empty tokeniser where its file is missing: every text would have the same feature."""
    shutil.copytree(whole / "sentence", tmp_path / "sentence")
    path = tmp_path / "sentence" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"boat": 11', '"boat": 99'))
    with pytest.raises(BadInput, match=r"has a token 99, the model 12 tokens: restore its tokenizer\.json"):
        text_of(tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match=r"has no words: restore its tokenizer\.json"):
        text_of(tmp_path)
    path.write_text(text)
    text_of(tmp_path)


def test_a_sentence_encoder_whose_file_lacks_weights_is_refused(whole: Path, tmp_path: Path) -> None:
    """transformers draws what is missing: every text would have another feature in the next process."""
    shutil.copytree(whole / "sentence", tmp_path / "sentence")
    (path,) = tmp_path.rglob("model.safetensors")
    weights = load_file(path)
    lost = next(name for name in weights if "LayerNorm" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(BadInput, match=rf"lacks 1 of its model's weights \({re.escape(lost)}\): restore its files"):
        text_of(tmp_path)
    save_file({name: tensor for name, tensor in weights.items() if "pooler" not in name}, path, {"format": "pt"})
    text_of(tmp_path)  # a pooler, which is not used


def test_words_that_end_within_a_line_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "words.txt").write_bytes(vectors()[:-3])
    load_word_vectors(tmp_path / "words.txt", WORDS)
    assert "the word vectors end within a line" in caplog.text


# ---------------------------------------------------------------------------------------------- code


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists(), "code of a file was run"


@pytest.mark.parametrize("name", ["image.pth", "image.pt", "image.bin", "image.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_in_place_of_weights_is_not_read(name: str, zipped: bool, tmp_path: Path, trace: Path) -> None:
    torch.save({"a": Planted(trace)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match="is not a file of weights"):
        read_weights(str(tmp_path / name))


def test_the_folder_of_a_sentence_encoder_runs_no_code(whole: Path, tmp_path: Path, trace: Path) -> None:
    """Neither as pickled weights, nor as a module that it names or an architecture of its own."""
    folder = tmp_path / "sentence"
    code = f"import os\nos.mkdir({str(trace)!r})\n"

    def planted(change: Callable[[], object]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole / "sentence", folder)
        change()
        with pytest.raises(BadInput, match=r"model\.text\.weights"):
            text_of(tmp_path)

    def change_json(name: str, **fields: Any) -> None:
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(record[:1] if isinstance(record, list) else record | fields))

    def own_module() -> None:
        (folder / "planted.py").write_text(code + "class Module: pass\n")
        records = json.loads((folder / "modules.json").read_text())
        records[-1]["type"] = "planted.Module"
        (folder / "modules.json").write_text(json.dumps(records))

    def own_model() -> None:
        (folder / "planted.py").write_text(code + "class Model: pass\n")
        change_json(
            "config.json", model_type="planted", auto_map={"AutoModel": "planted.Model", "AutoConfig": "planted.M"}
        )

    def pickled() -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"a": Planted(trace)}, folder / "pytorch_model.bin")

    for change in (own_module, own_model, pickled):
        planted(change)


def test_arrays_are_not_unpickled(tmp_path: Path, trace: Path) -> None:
    (tmp_path / "words.bin").write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises(BadInput, match="does not begin with"):
        load_word_vectors(tmp_path / "words.bin", WORDS)
