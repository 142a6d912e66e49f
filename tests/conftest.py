"""Fixtures: toy data sets in a temporary folder, and a SLURM cluster for those that need one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.services.slurm import Cluster, running_cluster
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


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM cluster for the session; without root or packages the tests are skipped and say why."""
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
