"""Terminals of other encodings than UTF-8, and standard streams that are closed, full or left by whoever read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import ROOT, environment, make_raw

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("terminals") / "dätä 一", counts={"train": 4, "val": 2, "test": 2})


def shards(words: str, data: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line of bash that is given `$shards` and `$data`."""
    here = environment() | {"shards": f"{sys.executable} -m shards", "data": str(data)} | variables
    done = subprocess.run(["bash", "-o", "pipefail", "-c", words], cwd=ROOT, env=here, capture_output=True)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["latin-1", "ascii", "C"],
)
def test_a_terminal_of_another_encoding(variables: dict[str, str], data: Path) -> None:
    code, said, error = shards('$shards stats "$data" --processes 1 && $shards --help', data, **variables)
    assert (code, "Traceback" in error) == (0, False), error
    assert "class 0" in said
    code, _, error = shards('$shards stats "$data/nöt"', data, **variables)
    assert (code, error.count("error: "), len(error.splitlines())) == (2, 1, 1), error


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        ('$shards stats "$data" --processes 1 >&-', {0}),
        ("$shards --help | head -1", {0, 1}),
        ('$shards stats "$data" --processes 1 | head -c 0', {0, 1}),
        ('$shards stats "$data" --processes 1 >/dev/full', {2}),
        ('$shards stats "$data/none" 2>&-', {2}),
    ],
)
def test_a_stream_that_takes_nothing(words: str, codes: set[int], data: Path) -> None:
    code, _, error = shards(words, data)
    assert code in codes, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_a_working_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    here = environment() | {"PYTHONPATH": str(ROOT)}
    for words in ("-m shards stats x", f"{ROOT}/launchers/train.py --data x", f"{ROOT}/launchers/search.py x y"):
        (tmp_path / "gone").mkdir(exist_ok=True)
        command = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {sys.executable} {words}"
        done = subprocess.run(["bash", "-c", command], env=here, text=True, capture_output=True)
        assert done.returncode == 2
        assert "the folder that this was started in cannot be used (No such file or directory): change" in done.stderr
        assert len(done.stderr.splitlines()) == 1
