"""A model in use: raw pictures and texts in, the same vectors as evaluation makes; one modality alone."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmgan_dist
from cmgan_dist.config.fields import Config
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import local
from cmgan_dist.models.saved import load_generator, read_model
from cmgan_dist.retrieval import model as model_module
from cmgan_dist.retrieval.embed import embed_split
from cmgan_dist.retrieval.metrics import l2_normalise
from cmgan_dist.retrieval.model import Model, load_model, pixels_of
from tests.toy import save_untrained, small_config


def raw_config() -> Config:
    config = small_config(8)
    config.model.image.name, config.model.image.image_size = "test_efficientnet", 32
    config.model.text.name, config.model.text.channels = "cnn", 4
    return config


def unit(x: torch.Tensor) -> np.ndarray:
    return l2_normalise(x).float().numpy()


def test_raw_items_get_the_vectors_of_an_evaluation_after_the_data_is_gone(
    raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, config = raw_data(), raw_config()
    save_untrained(tmp_path / "run", data, config)
    reader = ShardReader(str(data), "test")
    samples = list(reader)
    expected = embed_split(load_generator(read_model(tmp_path / "run")), reader, config, Parallel())
    shutil.move(tmp_path / "run" / "best", tmp_path / "copy")
    shutil.rmtree(data)
    model = cmgan_dist.load(str(tmp_path / "copy"))
    images = [s.image for s in samples if isinstance(s.image, bytes)]
    texts = [t for s in samples if isinstance(s.texts, list) for t in s.texts]
    for batch in (3, 64):
        np.testing.assert_allclose(model.encode_images(images, batch=batch), unit(expected.image.common), atol=2e-6)
        np.testing.assert_allclose(model.encode_texts(texts, batch=batch), unit(expected.text.common), atol=2e-6)
    assert (model.dim, model.classes) == (8, ["class 0", "class 1", "class 2"])
    made = model.encode_texts(texts)
    assert made.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)


def test_every_kind_of_picture_takes_one_way(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    data = raw_data()
    save_untrained(tmp_path / "run", data, raw_config())
    model = load_model(tmp_path / "run")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    out = io.BytesIO()
    picture.save(out, "PNG")
    (tmp_path / "a.png").write_bytes(out.getvalue())
    kinds = [picture, np.asarray(picture), out.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")]
    together = model.encode_images(kinds)
    assert together.shape == (5, 8)
    np.testing.assert_allclose(together, np.repeat(together[:1], 5, 0), atol=1e-6)
    for one in kinds:
        np.testing.assert_allclose(model.encode_images(one), together[:1], atol=1e-6)
    assert model.encode_images([]).shape == (0, 8)


def test_pictures_are_read_as_they_go(
    raw_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: no more than go through the backbone together are held."""
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    drawn, encoded = [], []
    pixels = model_module.pixels_of

    def watch(item: object, size: int, position: int) -> np.ndarray:
        encoded.append(position)
        assert len(drawn) - position <= 5
        return pixels(item, size, position)

    def pictures() -> Iterator[np.ndarray]:
        for i in range(23):
            drawn.append(i)
            yield np.full((40, 40, 3), i, np.uint8)

    monkeypatch.setattr(model_module, "pixels_of", watch)
    model = load_model(tmp_path / "run")
    assert model.encode_images(pictures(), batch=5).shape == (23, 8)
    assert encoded == list(range(23))


def test_one_modality_reads_no_backbone_of_the_other(
    raw_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    asked: list[str] = []
    load = model_module.load_backbone
    monkeypatch.setattr(model_module, "load_backbone", lambda s, m: asked.append(m) or load(s, m))
    model = load_model(tmp_path / "run")
    model.encode_texts("a red dog")
    model.encode_texts(["a green boat", "blue"])
    assert asked == ["text"]


def test_features_go_in_where_no_backbone_is_known(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data, config = feature_data(), small_config(8)
    save_untrained(tmp_path / "run", data, config)
    reader = ShardReader(str(data), "val")
    split = embed_split(load_generator(read_model(tmp_path / "run")), reader, config, Parallel())
    model = load_model(tmp_path / "run")
    made = model.encode_images(split.features.image.numpy())
    np.testing.assert_allclose(made, unit(split.image.common), atol=1e-6)
    np.testing.assert_allclose(model.encode_texts(split.features.text.numpy()), unit(split.text.common), atol=1e-6)
    with pytest.raises(BadInput, match=r"image features have shape \[2, 5\], expected \[n, 12\]"):
        model.encode_images(np.zeros((2, 5), np.float32))
    with pytest.raises(BadInput, match="takes text features of 7 numbers and does not say what made them"):
        model.encode_texts("a dog")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (b"not a picture", r"image 1: the image does not decode.*give another"),
        ("nowhere.jpg", r"image 1 \(nowhere\.jpg\) cannot be read \(No such file"),
        (np.zeros((4, 4, 7), np.uint8), r"image 1: it is no picture"),
        (np.zeros((4, 4, 3), np.int64), r"image 1: it is an array of int64 and shape \(4, 4, 3\)"),
        (17, "image 1: it is of type int"),
    ],
)
def test_what_is_no_picture_is_named_by_its_position(
    item: object, said: str, raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    good = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(BadInput, match=said):
        load_model(tmp_path / "run").encode_images([good, item])


def test_sixteen_bits_and_transparency_come_as_from_a_file(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    model = load_model(tmp_path / "run")
    ramp = np.linspace(0, 255, 40 * 50).reshape(40, 50).astype(np.uint8)
    eight, sixteen = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) << 8)
    file = io.BytesIO()
    sixteen.save(file, "PNG")
    expected = model.encode_images(eight)
    for item in (sixteen, sixteen.convert("I"), file.getvalue()):
        np.testing.assert_allclose(model.encode_images(item), expected, atol=1e-5)
    clear = Image.merge("RGBA", [Image.fromarray(ramp)] * 4)
    expected = model.encode_images(clear)
    for item in (clear.convert("RGBa"), Image.merge("LA", [Image.fromarray(ramp)] * 2).convert("La")):
        assert float((model.encode_images(item) * expected).sum()) > 0.999


def test_open_files_buffers_and_stacks_are_pictures_too(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    model = load_model(tmp_path / "run")
    stack = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    expected = model.encode_images(list(stack))
    for many in (stack, torch.from_numpy(stack), (picture for picture in stack)):
        np.testing.assert_array_equal(model.encode_images(many), expected)
    file = io.BytesIO()
    Image.fromarray(stack[0]).save(file, "PNG")
    for one in (io.BytesIO(file.getvalue()), bytearray(file.getvalue()), [io.BytesIO(file.getvalue())]):
        np.testing.assert_allclose(model.encode_images(one), expected[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.encode_images(None), "None cannot be encoded"),
        (lambda model: model.encode_images(5), "5 cannot be encoded"),
        (lambda model: model.encode_texts(None), "None cannot be encoded"),
        (lambda model: model.encode_texts(np.array("a dog")), "cannot be encoded"),
        (lambda model: model.encode_texts(b"a dog"), "the text is bytes: decode it first"),
        (lambda model: model.encode_texts(Path("a.txt")), r"the text is the path a\.txt: read it first"),
        (lambda model: model.encode_texts(["fine", "\ud800 cat"]), "text 1 is .*, which has half a character"),
        (lambda model: model.encode_images("a\0b.png"), "image 0 .* cannot be read"),
        (lambda model: model.encode_images("\ud800.png"), "image 0 .* cannot be read"),
        (lambda model: model.encode_images("/dev/zero"), "image 0 .* is no regular file"),
        (lambda model: model.encode_images("/tmp"), "is no regular file"),
        (lambda model: model.encode_images(Image.new("F", (4, 4))), "its pixels are floats"),
        (lambda model: model.export("x.onnx", modality="audio"), "modality is 'audio'"),
        (lambda model: model.export("a\0.onnx"), "holds characters that no path can"),
        (lambda _: load_model(None), "run is None: give a path"),  # type: ignore[arg-type]
        (lambda _: load_model("a\0b"), "holds characters that no path can"),
    ],
)
def test_what_cannot_be_encoded_is_one_sentence(
    call: Callable[[Model], object], said: str, raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    with pytest.raises(BadInput, match=said):
        call(load_model(tmp_path / "run"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta device", None])
def test_a_device_that_is_not_there_is_said(device: str, raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    with pytest.raises(BadInput, match=r"device is .*, which is not here"):
        load_model(tmp_path / "run", device)


def test_a_pipe_is_no_picture(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadInput, match="is no regular file"):
        load_model(tmp_path / "run").encode_images(tmp_path / "pipe.png")


def test_bfloat16_features_are_taken(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    model = load_model(tmp_path / "run")
    features = torch.randn(3, model.saved.spec.text.dim).bfloat16()
    np.testing.assert_array_equal(model.encode_texts(features), model.encode_texts(features.float()))


@pytest.mark.parametrize("text", ["", "  ", 5])
def test_an_empty_text_is_named_by_its_position(text: str, raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    with pytest.raises(BadInput, match="text 1 is"):
        load_model(tmp_path / "run").encode_texts(["a dog", text])


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_bad_items_are_left_out_where_asked_and_what_is_left_is_named(
    batch: int, raw_data: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    model = load_model(tmp_path / "run")
    good = [np.full((40, 40, 3), grey, np.uint8) for grey in (0, 90, 200)]
    items = [b"words", good[0], None, good[1], str(tmp_path / "nowhere.png"), good[2], b""]
    vectors, kept = model.encode_images((item for item in items), on_error="skip", batch=batch)  # type: ignore[misc]
    assert kept.tolist() == [1, 3, 5]
    np.testing.assert_allclose(vectors, model.encode_images(good), atol=1e-5)
    assert "4 of images left out, the first: image 0" in caplog.text
    vectors, kept = model.encode_texts(["", "red dog", 3, "a boat"], on_error="skip", batch=batch)  # type: ignore[list-item]
    assert kept.tolist() == [1, 3]
    np.testing.assert_allclose(vectors, model.encode_texts(["red dog", "a boat"]), atol=1e-6)
    for nothing in ([], [b"words"]):
        vectors, kept = model.encode_images(nothing, on_error="skip")
        assert (vectors.shape, kept.shape) == ((0, 8), (0,))
    with pytest.raises(BadInput, match="on_error is 'ignore', expected 'raise' or 'skip'"):
        model.encode_texts("a dog", on_error="ignore")  # type: ignore[call-overload]


def test_progress_is_told_where_asked(
    raw_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    model = load_model(tmp_path / "run")
    pictures = [np.zeros((40, 40, 3), np.uint8)] * 30
    model.encode_images(pictures, batch=2)
    model.encode_images(pictures[:1], batch=2, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(local, "LINE_EVERY_S", 0.01)
    model.encode_images(pictures, batch=2, progress=True)
    assert re.search(r"pictures: \d+ of 30, [\d.]+ a second, 0 min left\n", capsys.readouterr().err)
    model.encode_images(iter(pictures), batch=2, progress=True)
    assert re.search(r"pictures: \d+, [\d.]+ a second\n", capsys.readouterr().err)


def test_pictures_in_memory_are_turned_and_coloured_like_files(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    model = load_model(tmp_path / "run")
    exif = Image.Exif()
    exif[0x0112] = 6
    slope = np.linspace(0, 255, 96).astype(np.uint8)
    across, down = np.tile(slope, (64, 1)), np.tile(slope[:64, None], (1, 96))
    picture = Image.fromarray(np.stack([across, down, np.zeros_like(down)], 2))
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif, quality=100, subsampling=0)
    turned = Image.open(io.BytesIO(out.getvalue()))
    pixels = pixels_of(out.getvalue(), 32)
    assert np.abs(pixels_of(turned, 32).astype(int) - pixels).max() < 12
    assert np.abs(pixels_of(picture, 32).astype(int) - pixels).max() > 100
    for mode in ("CMYK", "YCbCr", "L", "P", "RGBA", "1", "HSV"):
        assert model.encode_images(picture.convert(mode)).shape == (1, 8)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_batch_is_a_whole_number_above_0(batch: int, feature_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    with pytest.raises(BadInput, match="batch is"):
        load_model(tmp_path / "run").encode_images(np.zeros((3, 12), np.float32), batch=batch)


def test_features_may_be_tensors_of_any_layout_and_must_be_finite(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    model, rows = load_model(tmp_path / "run"), np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    expected = model.encode_texts(rows)
    for same in (torch.from_numpy(rows), rows[::-1][::-1], rows.astype(">f4"), rows.astype(np.float64)):
        np.testing.assert_allclose(model.encode_texts(same), expected, atol=1e-6)
    for wrong, said in ((rows * np.nan, "NaN or Inf"), (rows[0], r"shape \[7\]")):
        with pytest.raises(BadInput, match=said):
            model.encode_texts(wrong)
