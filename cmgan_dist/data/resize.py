"""A crop becomes a square: antialiased for evaluation, by OpenCV for training.

Pretrained backbones were evaluated on antialiased bicubic squares, and get them. A training crop is drawn at random
anyway: where it is enlarged, or reduced by little, OpenCV takes a third of the time, and is off by no more than
decoding at half the size is; where it is reduced by much, OpenCV would leave pixels out, and is not asked."""

from __future__ import annotations

import math

import cv2
import numpy as np

QUICK_REDUCTION = 1.5
"""Most pixels of a crop to one of the square, each way on average, up to which OpenCV resizes it."""

TRAINING_TOLERANCE = 4.0
"""Grey levels of 255 that photographs in training are off on average, at most, from their crops resized exactly; pages
of text and other fine lines are further off."""
QUICK_WAY = f"resized by OpenCV {cv2.__version__}, photographs within {TRAINING_TOLERANCE:g} of 255 levels of exact"
"""What `resize_quick` does, for the log."""

cv2.setNumThreads(1)  # its threads do not outlive the fork of a DataLoader's worker, which would wait for them


def resize(pixels: np.ndarray, size: int, side: float | None = None) -> np.ndarray:
    """Resize uint8 [h, w, 4] to uint32 [size, size], red in the lowest byte (bicubic, antialiased).

    `side`: how much of a square counts, when its last row and column are only partly in the box."""
    height, width = pixels.shape[:2]
    if (height, width) != (size, size):
        import torch  # takes seconds, and `shards build` decodes without resizing
        from torch.nn.functional import interpolate

        rows = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        if side is None or side == height:
            resized = interpolate(rows, (size, size), mode="bicubic", antialias=True)
        else:
            resized = interpolate(rows, scale_factor=size / side, mode="bicubic", antialias=True)
        pixels = resized[0, :, :size, :size].permute(1, 2, 0).numpy()
    return pixels.view("<u4")[..., 0]


def resize_quick(pixels: np.ndarray, out: np.ndarray) -> None:
    """Resize uint8 [h, w, 4] into `out`, uint8 [size, size, 4] in one block, photographs within TRAINING_TOLERANCE of
    `resize`.

    Bicubic (OpenCV's is sharper, a = -0.75 for -0.5) where the crop is enlarged; bilinear, which leaves out less, where
    it is reduced."""
    size = len(out)
    reduction = math.sqrt(pixels.shape[0] * pixels.shape[1]) / size
    if reduction > QUICK_REDUCTION:
        np.copyto(out.view("<u4")[..., 0], resize(pixels, size))
    else:
        cv2.resize(pixels, (size, size), dst=out, interpolation=cv2.INTER_CUBIC if reduction <= 1 else cv2.INTER_LINEAR)


def mirror(pixels: np.ndarray) -> None:
    """Exchange left and right of uint8 [h, w, 4] in its place."""
    cv2.flip(pixels, 1, dst=pixels)
