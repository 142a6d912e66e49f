"""How the peers of bench/stream.py make a picture of JPEG bytes, as their users write it: uint8 [3, 224, 224], or
[224, 224, 3] by those that work on pixels of three bytes, which `planes` shows as the former without a copy."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # torch takes seconds to import, and --help waits
    from torch import Tensor

SIZE = 224
CROP_AREA, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


def transform(train: bool) -> Any:
    """PIL image or uint8 tensor [3, h, w] -> [3, 224, 224], of the same kind."""
    v2: Any = import_module("torchvision.transforms.v2")
    bicubic = v2.InterpolationMode.BICUBIC
    if train:
        crop = v2.RandomResizedCrop(SIZE, CROP_AREA, CROP_RATIO, interpolation=bicubic, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    return v2.Compose([v2.Resize(SIZE, interpolation=bicubic, antialias=True), v2.CenterCrop(SIZE)])


def decoder(how: str, train: bool) -> Callable[[bytes], Tensor]:
    """Return the function that makes a picture of JPEG bytes; `how` is a key of DECODERS."""
    return DECODERS[how](train)


def planes(image: Tensor) -> Tensor:
    """Return a batch as [n, 3, 224, 224], whichever way its pixels lie."""
    return image.permute(0, 3, 1, 2) if image.shape[-1] == 3 else image


def _by_pil(train: bool) -> Callable[[bytes], Tensor]:
    to_tensor = import_module("torchvision.transforms.v2.functional").pil_to_tensor
    change = transform(train)

    def decode(data: bytes) -> Tensor:
        tensor: Tensor = to_tensor(change(Image.open(io.BytesIO(data)).convert("RGB")))
        return tensor

    return decode


def _by_torchvision(train: bool) -> Callable[[bytes], Tensor]:
    import torch

    tv: Any = import_module("torchvision")
    change = transform(train)

    def decode(data: bytes) -> Tensor:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensor: Tensor = change(tv.io.decode_jpeg(raw, mode=tv.io.ImageReadMode.RGB))
        return tensor

    return decode


def _by_opencv(area: bool) -> Callable[[bool], Callable[[bytes], Tensor]]:
    """`area`: a picture is reduced by INTER_AREA, which leaves nothing out, and not by INTER_LINEAR, the fastest."""

    def make(train: bool) -> Callable[[bytes], Tensor]:
        import torch

        cv2: Any = import_module("cv2")
        cv2.setNumThreads(1)
        smaller, larger = cv2.INTER_AREA if area else cv2.INTER_LINEAR, cv2.INTER_CUBIC

        def resize(crop: np.ndarray, reduced: bool) -> np.ndarray:
            square: np.ndarray = cv2.resize(crop, (SIZE, SIZE), interpolation=smaller if reduced else larger)
            return square

        def decode(data: bytes) -> Tensor:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            return torch.from_numpy(_cut(image, train, resize, lambda square: cv2.flip(square, 1)))

        return decode

    return make


def _by_kornia(train: bool) -> Callable[[bytes], Tensor]:
    import torch

    kornia: Any = import_module("kornia_rs")

    def resize(crop: np.ndarray, reduced: bool) -> np.ndarray:
        way = "bilinear" if reduced else "bicubic"
        square: np.ndarray = kornia.imgproc.resize(np.ascontiguousarray(crop), (SIZE, SIZE), way, antialias=False)
        return square

    def decode(data: bytes) -> Tensor:
        image = kornia.io.decode_image_jpegturbo(data, "rgb")
        return torch.from_numpy(_cut(image, train, resize, kornia.imgproc.horizontal_flip))

    return decode


DECODERS: dict[str, Callable[[bool], Callable[[bytes], Tensor]]] = {
    "PIL": _by_pil,
    "torchvision": _by_torchvision,
    "OpenCV": _by_opencv(area=False),
    "OpenCV area": _by_opencv(area=True),
    "kornia_rs": _by_kornia,
}


def _cut(
    image: np.ndarray,
    train: bool,
    resize: Callable[[np.ndarray, bool], np.ndarray],
    flip: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return a crop of uint8 [h, w, 3] as [224, 224, 3]. `resize` is told whether the crop is larger than that."""
    height, width = image.shape[:2]
    left, top, w, h = _random_crop(width, height) if train else _centre(width, height)
    square = resize(image[top : top + h, left : left + w], w * h > SIZE * SIZE)
    return flip(square) if train and random.random() < 0.5 else square


def _centre(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _random_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, width, height as torchvision's RandomResizedCrop draws them, without its tensors."""
    for _ in range(10):
        area = width * height * random.uniform(*CROP_AREA)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    return _centre(width, height)
