"""Fixtures: toy data sets in a temporary folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.toy import make_features, make_raw

torch.set_num_threads(1)
# The same examples in every CI run: what it finds must be reproducible. On a developer's machine they are drawn anew.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def feature_data(tmp_path: Path) -> Callable[..., Path]:
    """make(name="data", **options of make_features) -> folder."""
    return lambda name="data", **options: make_features(tmp_path / name, **options)


@pytest.fixture
def raw_data(tmp_path: Path) -> Callable[..., Path]:
    """make(name="raw", **options of make_raw) -> folder."""
    return lambda name="raw", **options: make_raw(tmp_path / name, **options)
