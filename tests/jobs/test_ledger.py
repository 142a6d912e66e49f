"""Records of what is done: what they hold, and when they are believed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.files import sha256_of
from cmgan_dist.jobs import ledger
from cmgan_dist.jobs.ledger import Record

SETTINGS = {"batch_size": 7, "image": {"dim": 3}}


@pytest.fixture
def done(tmp_path: Path) -> Record:
    path = tmp_path / "a.tar"
    path.write_bytes(b"what was written")
    written = {"name": path.name, "samples": 2, "bytes": 16, "sha256": sha256_of(path)}
    return Record("source", SETTINGS, True, written, ["b: is bad"])


def test_a_record_is_read_as_it_was_written(tmp_path: Path, done: Record) -> None:
    path = tmp_path / "a.json"
    assert ledger.read(path) is None
    ledger.write(path, done)
    assert ledger.read(path) == done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.tar"]
    assert done.is_of("source", dict(SETTINGS))
    assert not done.is_of("other", SETTINGS)
    assert not done.is_of("source", {**SETTINGS, "batch_size": 8})


@pytest.mark.parametrize(
    "change", [{"written": {"name": "a.tar"}}, {"written": []}, {"left_out": None}, {"more": 1}, None]
)
def test_what_is_no_record_is_not_read(tmp_path: Path, done: Record, change: dict[str, Any] | None) -> None:
    path = tmp_path / "a.json"
    ledger.write(path, done)
    path.write_text("[1]" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    assert ledger.read(path) is None


def test_done_means_the_same_bytes(tmp_path: Path, done: Record) -> None:
    path = tmp_path / "a.tar"
    assert ledger.is_done(done, tmp_path)
    path.write_bytes(b"What was written")
    assert not ledger.is_done(done, tmp_path)
    path.unlink()
    assert not ledger.is_done(done, tmp_path)
    assert ledger.is_done(Record("source", SETTINGS, True), tmp_path)  # there was nothing to write
    assert not ledger.is_done(Record("source", SETTINGS), tmp_path)


def test_files_beside_must_be_whole_too(tmp_path: Path, done: Record) -> None:
    (tmp_path / "b").write_bytes(b"more")
    beside = [{"name": "b", "samples": 1, "bytes": 4, "sha256": sha256_of(tmp_path / "b")}]
    both = replace(done, beside=beside)
    ledger.write(tmp_path / "a.json", both)
    assert ledger.read(tmp_path / "a.json") == both
    assert ledger.is_done(both, tmp_path)
    (tmp_path / "b").write_bytes(b"mere")
    assert not ledger.is_done(both, tmp_path)


def test_a_failed_job_leaves_no_record_but_anothers(tmp_path: Path, done: Record) -> None:
    path = tmp_path / "a.json"
    ledger.write(path, Record("source", SETTINGS))
    ledger.abandon(path)
    assert not path.exists()
    ledger.write(path, done)
    ledger.abandon(path)
    assert ledger.read(path) == done
