"""Threads are what the machine grants: affinity, quotas of cgroups, and OMP_NUM_THREADS where a user set it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmgan_dist.jobs import cores
from cmgan_dist.jobs.cores import cpu_quota, openmp_threads, threads_for, usable_cores
from tests.toy import ROOT, environment, torchrun

pytestmark = pytest.mark.process


def groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name).write_text(text)
    (folder / "self").write_text(own)
    return folder / "cgroup", folder / "self"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/not/here\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        (
            "3:cpu,cpuacct:/d\n",
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "300000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("3:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1\n", "cpu/d/cpu.cfs_period_us": "100000\n"}, None),
        ("3:memory:/d\n", {}, None),
        ("0::/a\n", {"a/cpu.max": "nonsense"}, None),
    ],
)
def test_the_least_quota_of_a_group_and_those_above_it(
    own: str, files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(*groups(tmp_path, own, files)) == expected


def test_a_quota_makes_cores_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: 2.5)
    assert usable_cores() == 3
    assert threads_for(1) == (3, "3 usable cores, by a quota of 2.5, 1 process here")
    monkeypatch.setattr(cores, "cpu_quota", lambda: 0.2)
    assert usable_cores() == 1
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert threads_for(4) == (2, "8 usable cores, 4 processes here")
    assert threads_for(4, asked=7)[0] == 7


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), ("2,1", 2), ("", None), ("0", None), ("many", None), ("²", None), ("9" * 11, None)]
)
def test_what_a_user_says_in_the_environment(text: str, expected: int | None) -> None:
    assert openmp_threads({"OMP_NUM_THREADS": text}) == expected


@pytest.mark.parametrize("text", ["4097", "0", "-1", "many"])
def test_what_is_no_number_of_threads_is_said(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_for(1)[1].endswith(f"; OMP_NUM_THREADS is '{text}', not a number from 1 to 4096, and not used")
    monkeypatch.setenv("OMP_NUM_THREADS", " ")
    assert "OMP_NUM_THREADS" not in threads_for(1)[1]


OWN = [sys.executable, "-m", "cmgan_dist.distributed.launch", "--standalone", "--nproc_per_node", "1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]


@pytest.mark.parametrize(
    ("command", "asked", "expected"),
    [
        ([*torchrun(2), "SCRIPT"], "", None),
        ([*torchrun(2), "SCRIPT"], "3", 3),
        ([*OWN, "SCRIPT"], "", None),
        (["bash", "-c", f"export OMP_NUM_THREADS=3; {' '.join(torchrun(1))} SCRIPT; true"], "", 3),
        ([*ACCELERATE, "SCRIPT"], "", None),
        ([*ACCELERATE, "--num_cpu_threads_per_process", "3", "SCRIPT"], "", 3),
        (["bash", "accelerate/run.sh", "SCRIPT"], "", 3),
    ],
)
def test_a_launchers_own_value_is_no_users(
    command: list[str], asked: str, expected: int | None, tmp_path: Path
) -> None:
    """torchrun sets OMP_NUM_THREADS=1 where it is not set, accelerate as many as there are cores for each process."""
    script, folder = tmp_path / "say.py", tmp_path / "accelerate"
    said = "os.write(1, f'threads {openmp_threads()}\\n'.encode())"  # in one piece: two processes write
    script.write_text(f"import os\nfrom cmgan_dist.jobs.cores import openmp_threads\n{said}\n")
    folder.mkdir()
    (folder / "run.sh").write_text(f"export OMP_NUM_THREADS=3\n{sys.executable} $1\ntrue\n")
    env = environment() | {"PYTHONPATH": str(ROOT)}
    del env["OMP_NUM_THREADS"]
    env |= {"OMP_NUM_THREADS": asked} if asked else {}
    words = [word.replace("SCRIPT", str(script)) for word in command]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    found = [line for line in done.stdout.split("\n") if line.startswith("threads")]
    assert set(found) == {f"threads {expected}"}, done.stderr[-2000:]
