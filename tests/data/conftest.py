"""Fixtures of the tests of stores: a server that fails on demand, and stores of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.data import source as source_module
from cmgan_dist.data.cache import CachedStore, open_store
from tests.services.faulty_server import FaultyServer
from tests.toy import body_of


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """A server of ten shards and a manifest under /data."""
    server = FaultyServer()
    server.files = {f"/data/s-{i}.tar": body_of(i) for i in range(10)}
    server.files["/data/manifest.json"] = b'{"a": 1}'
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache folder of the stores that `make` opens."""
    return tmp_path / "cache"


@pytest.fixture
def make(server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CachedStore]:
    """make(**options of open_store): a store of the server with short waits."""
    monkeypatch.setattr(source_module, "BACKOFF_S", 0.02)

    def make(path: str = "/data", **options: Any) -> CachedStore:
        defaults: dict[str, Any] = {"cache": str(cache), "timeout_s": 5.0, "retries": 3}
        store = open_store(server.url + path, **(defaults | options))
        assert isinstance(store, CachedStore)
        return store

    return make
