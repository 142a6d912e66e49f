"""Canonical correlation analysis of paired rows with a ridge a side, in closed form: for any ridges at little cost.

Shapes: n pairs, F_i and F_t features of image and text, E canonical dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Canonical:
    """Canonical directions of image and text, the most correlated first."""

    image: np.ndarray
    """float64 [F_i, E]."""
    text: np.ndarray
    """float64 [F_t, E]."""
    correlation: np.ndarray
    """float64 [E], descending."""


class _Side:
    """The covariance of rows x [n, F] of one modality by its eigenvectors, in which any ridge is whitened cheaply."""

    def __init__(self, x: np.ndarray) -> None:
        self.centre = x.mean(0)
        values, self.vectors = np.linalg.eigh((x - self.centre).T @ (x - self.centre) / len(x))
        self.values = values.clip(min=0.0)

    def scale(self, ridge: float) -> np.ndarray:
        """[F]: what whitens each eigenvector of cov(x) + ridge * mean variance * I; 0 where x has no variance."""
        values = self.values + ridge * self.values.mean()
        kept = values > values.max() * 1e-10
        return np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0)


def _singular(m: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (U [a, r], singular values [r], descending, V [b, r]) of m [a, b] by the eigenvectors of its smaller Gram
    matrix, in a tenth of the time of an SVD; at most the first `most`. Directions below 1e-5 of the largest, where that
    is not exact, are left out."""
    if m.shape[0] < m.shape[1]:
        v, values, u = _singular(m.T, most)
        return u, values, v
    squares, v = np.linalg.eigh(m.T @ m)
    squares, v = squares[::-1][:most].clip(min=0), v[:, ::-1][:, :most]
    kept = squares > squares[0] * 1e-10
    values, v = np.sqrt(squares[kept]), v[:, kept]
    return m @ v / values, values, v


class PairedRows:
    """Rows of image [n, F_i] and text [n, F_t], for CCA (Hotelling 1936; with a ridge: Vinod 1976) with any ridges."""

    def __init__(self, image: np.ndarray, text: np.ndarray) -> None:
        self.image, self.text = _Side(image), _Side(text)
        cross = (image - self.image.centre).T @ (text - self.text.centre) / len(image)
        self.cross = self.image.vectors.T @ cross @ self.text.vectors

    def solve(self, ridges: tuple[float, float], dims: int | None = None) -> Canonical:
        """Return the first `dims` canonical directions, None is all; `ridges`, of image and text, times the mean
        variance are added to the diagonals of the covariances. A direction that the pairs do not span is left out."""
        scale_i, scale_t = self.image.scale(ridges[0]), self.text.scale(ridges[1])
        u, correlation, v = _singular(scale_i[:, None] * self.cross * scale_t, dims)
        return Canonical(
            self.image.vectors @ (scale_i[:, None] * u), self.text.vectors @ (scale_t[:, None] * v), correlation
        )
