"""Records of what is done: what they hold, and when they are believed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.data.output import abandon_record, is_done, read_record, write_record
from cmgan_dist.data.store import FileStore
from cmgan_dist.files import sha256_of
from cmgan_dist.jobs.ledger import Record

SETTINGS = {"batch_size": 7, "image": {"dim": 3}}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path), "--output")


@pytest.fixture
def done(tmp_path: Path) -> Record:
    path = tmp_path / "a.tar"
    path.write_bytes(b"what was written")
    written = {"name": path.name, "samples": 2, "bytes": 16, "sha256": sha256_of(path)}
    return Record("source", SETTINGS, True, written, ["b: is bad"])


def test_a_record_is_read_as_it_was_written(tmp_path: Path, store: FileStore, done: Record) -> None:
    tmp_path / "a.json"
    assert read_record(store, "a.json") is None
    write_record(store, "a.json", done)
    assert read_record(store, "a.json") == done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.tar"]
    assert done.is_of("source", dict(SETTINGS))
    assert not done.is_of("other", SETTINGS)
    assert not done.is_of("source", {**SETTINGS, "batch_size": 8})


@pytest.mark.parametrize(
    "change", [{"written": {"name": "a.tar"}}, {"written": []}, {"left_out": None}, {"more": 1}, None]
)
def test_what_is_no_record_is_not_read(
    tmp_path: Path, store: FileStore, done: Record, change: dict[str, Any] | None
) -> None:
    path = tmp_path / "a.json"
    write_record(store, "a.json", done)
    path.write_text("[1]" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    assert read_record(store, "a.json") is None


def test_done_means_the_same_bytes(tmp_path: Path, store: FileStore, done: Record) -> None:
    path = tmp_path / "a.tar"
    assert is_done(store, done)
    path.write_bytes(b"What was written")
    assert not is_done(store, done)
    path.unlink()
    assert not is_done(store, done)
    assert is_done(store, Record("source", SETTINGS, True))  # there was nothing to write
    assert not is_done(store, Record("source", SETTINGS))


def test_files_beside_must_be_whole_too(tmp_path: Path, store: FileStore, done: Record) -> None:
    (tmp_path / "b").write_bytes(b"more")
    beside = [{"name": "b", "samples": 1, "bytes": 4, "sha256": sha256_of(tmp_path / "b")}]
    both = replace(done, beside=beside)
    write_record(store, "a.json", both)
    assert read_record(store, "a.json") == both
    assert is_done(store, both)
    (tmp_path / "b").write_bytes(b"mere")
    assert not is_done(store, both)


def test_a_failed_job_leaves_no_record_but_anothers(tmp_path: Path, store: FileStore, done: Record) -> None:
    path = tmp_path / "a.json"
    write_record(store, "a.json", Record("source", SETTINGS))
    abandon_record(store, "a.json", "b.tar")
    assert not path.exists()
    write_record(store, "a.json", done)
    abandon_record(store, "a.json", "b.tar")
    assert read_record(store, "a.json") == done


def test_a_file_beside_a_failed_job_stays_known_as_its_own(tmp_path: Path, store: FileStore) -> None:
    write_record(store, "a.json", Record("source", SETTINGS))
    (tmp_path / "b.tar").write_bytes(b"whole or not")
    abandon_record(store, "a.json", "b.tar")
    assert read_record(store, "a.json") == Record("source", SETTINGS)
