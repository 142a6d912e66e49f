"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from cmgan_dist.files import sha256_of, write_atomic
from tests.toy import run_together


def test_bytes_and_texts_are_written_and_folders_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    write_atomic(path, "Grüße")
    assert path.read_bytes() == "Grüße".encode()
    write_atomic(str(path), b"\xff")
    assert path.read_bytes() == b"\xff"
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    write_atomic(tmp_path / "a", b"x")
    (aside,), (final,) = seen
    assert final == "a"
    assert aside.startswith(f".{socket.gethostname()}-{os.getpid()}-")
    assert aside.endswith(".tmp")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


def test_writers_with_one_process_id_on_several_hosts_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a file of its own on its way; the last one to rename wins."""
    real, names = os.replace, list[str]()

    def replace(source: Path, target: Path) -> None:
        names.append(Path(source).name)
        if len(names) == 1:  # another host writes the same path while this one is about to rename
            write_atomic(target, "theirs")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "a", "ours")
    assert len(set(names)) == 2
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "ours"}


def test_processes_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    def write(i: int) -> None:
        for _ in range(20):
            write_atomic(tmp_path / "a", str(i) * 100_000)

    run_together(3, write)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert text in {str(i) * 100_000 for i in range(3)}


def test_a_file_system_without_fsync_of_folders_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(22, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_sha256_of_paths_and_descriptors(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_of(tmp_path / "a") == sha256_of(str(tmp_path / "a")) == expected
    file = os.open(tmp_path / "a", os.O_RDONLY)
    assert sha256_of(file) == expected
    assert os.pread(file, 3, 0) == data[:3], "the descriptor was closed"
    os.close(file)
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")
