"""The package as a wheel in an environment of its own: what is in it, and its command ``cmgan``.

The environment sees the packages that are installed here, through a .pth file, but not this repository; nothing is
downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

from launchers.__main__ import COMMANDS
from tests.toy import ROOT, SMALL, make_features

PACKED = ["cmgan_dist", "launchers", "shards", "tune"]
DATA = ["cmgan_dist/**/templates/*", "cmgan_dist/**/static/*", "launchers/configs/*.yaml", "launchers/slurm/*.sbatch"]


def run(*command: object, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKED, "tests", "bench"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, folder / "source", cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The bin folder of an environment in which the wheel is installed."""
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    return environment / "bin"


def test_the_wheel_has_all_data_and_no_tests(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for name in PACKED for path in (ROOT / name).rglob("*.py")}
    expected |= {p.relative_to(ROOT).as_posix() for pattern in DATA for p in ROOT.glob(pattern) if p.is_file()}
    expected.add("cmgan_dist/py.typed")
    assert len(expected) > 100
    assert not expected - packed
    others = {name.split("/")[0] for name in packed if ".dist-info/" not in name}
    assert others == set(PACKED)


def test_help_is_one_screen_and_at_once(installed: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    shown = run(installed / "cmgan", "--help", cwd=tmp_path).stdout
    took = time.perf_counter() - start
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 80
    assert took < 10  # a process that imports torch takes longer on a busy machine; bench is where speed is measured
    code = (
        "import sys, launchers.__main__; print(sorted({'torch', 'numpy', 'tyro', 'rich', 'yaml'} & set(sys.modules)))"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_train_and_evaluate_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    make_features(tmp_path / "data")
    words = [*SMALL, "train.epochs=1", "--data", "data", "--output", "runs/toy"]
    run(installed / "cmgan", "train", *words, cwd=tmp_path)
    run(installed / "cmgan", "evaluate", "runs/toy", "--no-baselines", cwd=tmp_path)
    assert (tmp_path / "runs" / "toy" / "report.html").is_file()  # its templates are in the wheel
    code = "import cmgan_dist, launchers.train, shards, tune; "
    code += "print(*(m.__file__ for m in (cmgan_dist, launchers.train, shards, tune)))"
    where = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert len(where) == 4
    assert all(Path(file).is_relative_to(installed.parent) for file in where), where


def test_exit_codes_and_hints_are_those_of_the_command(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "cmgan", "train", "--preset", "smoke", cwd=tmp_path, expect=2).stderr
    assert said == "error: --data is missing: name a folder, see cmgan train --help\n"
    said = run(installed / "cmgan", "fly", cwd=tmp_path, expect=2).stderr
    assert said.startswith("error: unknown command 'fly': choose one of train, evaluate")
    assert run(installed / "cmgan", "shards", "--help", cwd=tmp_path).stdout.startswith("usage: cmgan shards COMMAND")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-m", "launchers.train"], ["-m", "launchers", "train"]], ids=" ".join)
def test_accelerate_starts_the_installed_launcher(words: list[str], installed: Path, tmp_path: Path) -> None:
    make_features(tmp_path / "data")
    launch = [installed / "python", "-m", "accelerate.commands.launch", "--num_processes", "2", *words, *SMALL]
    done = run(*launch, "train.epochs=1", "--data", "data", "--output", "run", cwd=tmp_path)
    assert "2 processes on cpu" in done.stderr
