"""launchers/embed.py in real processes: killed and resumed, two processes, two ranks; the bytes are those of one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.retrieval.embed_cases import files, raw_run, whole
from tests.services import forked
from tests.toy import ROOT, environment, wait_for

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A run, its data, and the files that one undisturbed process writes."""
    folder = tmp_path_factory.mktemp("embed")
    run, data = raw_run(folder, counts={"train": 150, "val": 150, "test": 150, "more": 150})
    whole(run, folder / "emb", data=data)
    return run, data, files(folder / "emb")


def words(run: Path, output: Path, *extra: str) -> list[str]:
    return [str(ROOT / "launchers" / "embed.py"), str(run), "--output", str(output), *extra]


def to_end(command: list[str], expect: int = 0, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    done = forked.run(command, environment(), ranks)
    assert done.returncode == expect, done.stderr
    return done


def test_killed_in_the_middle_and_resumed(case: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    run, data, expected = case
    command = words(run, tmp_path / "emb", "--data", str(data), "--processes", "1")
    first = forked.Forked(command, environment())
    wait_for((tmp_path / "emb" / "train-000000.record.json").exists, within_s=120)
    first.kill()
    assert not (tmp_path / "emb" / "embeddings.json").exists(), "it was not killed in the middle"
    record = (tmp_path / "emb" / "train-000000.record.json").stat().st_mtime_ns
    done = to_end(command)
    assert files(tmp_path / "emb") == expected
    assert (tmp_path / "emb" / "train-000000.record.json").stat().st_mtime_ns == record
    assert "wrote" in done.stdout


def test_two_processes_and_two_ranks(case: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    run, data, expected = case
    two = words(run, tmp_path / "two", "--data", str(data), "--processes", "2")
    to_end(two)
    assert files(tmp_path / "two") == expected
    ranks = words(run, tmp_path / "ranks", "--data", str(data))
    done = to_end(ranks, ranks=2)
    assert files(tmp_path / "ranks") == expected
    assert "wrote" in done.stdout


def test_an_error_is_one_sentence(case: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    run, _, _ = case
    done = to_end(words(run, tmp_path / "emb", "--data", str(tmp_path / "none")), expect=2)
    assert done.stderr.startswith("error: data folder ")
    assert "Traceback" not in done.stderr
