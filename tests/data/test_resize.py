"""Training pictures are as near to an exact resize as the docs say; those of evaluation never meet OpenCV."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch.nn.functional import interpolate

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data import image as image_module
from cmgan_dist.data.image import Box, decode_image, eighths_for
from cmgan_dist.data.resize import QUICK_REDUCTION, TRAINING_TOLERANCE, resize, resize_quick
from cmgan_dist.data.stream import Stream
from tests.toy import make_raw


def photograph(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [h, w, 3] with detail of every size, falling with the frequency. It has so much that decoding at half the
    size is off by 2 levels, as with the photographs that are reduced to 512 px in bench/stream.py."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) + 1 / max(width, height)
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    made = np.fft.ifft2(np.fft.fft2(0.8 * noise[:1] + 0.4 * noise) / frequency**1.2).real
    made = 127 + 25 * (made - made.mean()) / made.std()
    return np.clip(made, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def exact(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic, antialiased, in 64 bits: float64 [size, size, 3]."""
    rows = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    made = interpolate(rows, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return np.clip(made, 0, 255)


def snapped(box: Box, eighths: int) -> Box:
    """The crop that is taken: its edges at whole pixels of the scaled picture."""
    left, top, right, bottom = (round(edge * eighths / 8) * 8 // eighths for edge in box)
    return left, top, right, bottom


class NoFlip(random.Random):
    """Draws 0.9 alone: never a flip."""

    def random(self) -> float:
        return 0.9


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [64, 100, 140, 160, 200, 300, 420, 700])
@pytest.mark.parametrize("ratio", [3 / 4, 1, 4 / 3])
def test_a_training_crop_is_within_the_tolerance(
    kind: str, side: int, ratio: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    size, width, height = 96, round(side * ratio**0.5), round(side / ratio**0.5)
    pixels = photograph(width + 40, height + 40)
    Image.fromarray(pixels).save(tmp_path / "picture", kind, quality=95)
    data = (tmp_path / "picture").read_bytes()
    box = (16, 8, 16 + width, 8 + height)
    monkeypatch.setattr(image_module, "random_box", lambda *_: box)
    made = decode_image(data, size, NoFlip(0))[..., :3]
    if kind == "JPEG":
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        box = snapped(box, eighths_for(box, size, exact=False))
    expected = exact(pixels[box[1] : box[3], box[0] : box[2]], size)
    assert np.abs(made - expected).mean() <= TRAINING_TOLERANCE


def test_a_crop_that_is_reduced_by_much_leaves_nothing_out() -> None:
    pixels = np.zeros((400, 400, 4), np.uint8)
    pixels[..., :3] = photograph(400, 400)
    size = int(400 / QUICK_REDUCTION) - 2
    made = np.empty((size, size, 4), np.uint8)
    resize_quick(pixels, made)
    assert np.array_equal(made.view("<u4")[..., 0], resize(pixels, size))


def test_evaluation_is_resized_by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = photograph(150, 150)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95)
    monkeypatch.setattr(cv2, "resize", lambda *_, **__: pytest.fail("OpenCV was asked"))
    made = decode_image(data, 96)[..., :3]
    expected = exact(simplejpeg.decode_jpeg(data, "RGB"), 96)
    assert np.abs(made - expected).max() <= 1.0
    with pytest.raises(BaseException, match="OpenCV was asked"):
        decode_image(data, 96, random.Random(0))


def test_opencv_has_no_threads_that_a_fork_would_lose() -> None:
    assert cv2.getNumThreads() == 1


def test_the_log_says_once_what_resizes_training_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = str(make_raw(tmp_path / "data"))
    with caplog.at_level(logging.INFO, "cmgan_dist"):
        stream = Stream(data, StreamConfig(global_batch=8), seed=0, image_size=32)
        next(stream.batches(0))
        Stream(data, StreamConfig(global_batch=8, augment=False), seed=0, image_size=32)
    assert [f"OpenCV {cv2.__version__}" in line for line in caplog.messages].count(True) == 1
