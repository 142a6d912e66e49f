"""Fixtures: toy data sets in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.toy import make_features, make_raw

torch.set_num_threads(1)


@pytest.fixture
def feature_data(tmp_path: Path) -> Callable[..., Path]:
    """make(name="data", **options of make_features) -> folder."""
    return lambda name="data", **options: make_features(tmp_path / name, **options)


@pytest.fixture
def raw_data(tmp_path: Path) -> Callable[..., Path]:
    """make(name="raw", **options of make_raw) -> folder."""
    return lambda name="raw", **options: make_raw(tmp_path / name, **options)
