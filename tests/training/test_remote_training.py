"""Training from a URL: the same bits as from the folder, through faults, on one and two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.services.faulty_server import FaultyServer
from tests.toy import final_state, run_to_end

pytestmark = pytest.mark.process


def test_training_from_a_url_equals_training_from_the_folder(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data = feature_data(splits={"train": [40, 25, 31, 16], "val": [24]})
    extra = ["train.epochs=3", "stream.window=1", "stream.timeout_s=2"]
    run_to_end(data, tmp_path / "local", *extra)
    expected = final_state(tmp_path / "local")
    server = FaultyServer()
    try:
        server.files = {f"/{p.name}": p.read_bytes() for p in data.iterdir()}
        server.faults = {
            "/train-000001.tar": ["500", "truncated"],
            "/manifest.json": ["503"],
            "/val-000000.tar": ["reset"],
        }
        cache = f"stream.cache={tmp_path / 'cache'}"
        run_to_end(server.url, tmp_path / "remote", cache, "stream.workers=2", *extra)
        assert server.requests["/train-000000.tar"] == 1
        assert server.requests["/train-000001.tar"] == 3
        run_to_end(server.url, tmp_path / "two", cache, *extra, processes=2)
        assert server.requests["/train-000000.tar"] == 1, "the cache is shared by later runs"
    finally:
        server.close()
    found = final_state(tmp_path / "remote")
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_dead_url_is_one_sentence(tmp_path: Path) -> None:
    server = FaultyServer()
    server.close()
    quick = ["stream.retries=1", "stream.timeout_s=1", f"stream.cache={tmp_path / 'cache'}"]
    done = run_to_end(server.url, tmp_path / "run", *quick, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert server.url in errors[0]
