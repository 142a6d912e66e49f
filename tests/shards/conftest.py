"""The folder of raw pairs that most tests of shards begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import fill_folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two classes in three split folders: 40, 6 and 6 pairs."""
    sizes = {"train": 20, "dev": 3, "test": 3}
    names = [f"{s}/{c}/{s}{i:02d}" for s, count in sizes.items() for c in ("cat", "dog") for i in range(count)]
    return fill_folder(tmp_path / "raw", names)
