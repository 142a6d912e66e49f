"""What a launch that fails leaves for its user to read: the sentence of the process that failed, last of all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.distributed.join import say_unused
from cmgan_dist.distributed.launch_config import launch_environment
from cmgan_dist.errors import EXIT_BAD_INPUT, EXIT_LOST, BadInput, run_main
from cmgan_dist.interrupts import EXIT_SIGNALLED
from tests.services import forked
from tests.services.slurm import free_port
from tests.toy import ROOT, environment, torchrun, train_words, wait_for

pytestmark = pytest.mark.process
OURS = [sys.executable, "-m", "cmgan_dist.distributed.launch", "--standalone", "--nproc_per_node", "2"]
WRONG = """
import os, signal, sys, time
from cmgan_dist.errors import BadInput, run_main
rank, case = int(os.environ["RANK"]), sys.argv[1]
def main():
    if case == "everywhere" or (case == "second" and rank):
        raise BadInput("--data x is no folder: name another", everywhere=True)
    if case == "killed" and rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "saved":
        return 85
    time.sleep(60 if case in ("second", "killed") else 0)
run_main(main)
"""
LOST = """
import os, signal, sys
from cmgan_dist.errors import BadInput, LostProcess, run_main
from cmgan_dist.jobs.startup import ended_by_signals
def fail(case):
    if case == "input":
        raise BadInput("shard x.tar is damaged: write it again")
    if case == "disk":
        raise OSError(28, "No space left on device", "x.tar")
    if case == "bug":
        raise KeyError("bug")
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise BadInput("checkpoint x cannot be read here", everywhere=True)
def main():
    rank, case = int(os.environ["RANK"]), sys.argv[1]
    if rank == 1:
        os.open(sys.argv[0] + ".pipe", os.O_WRONLY)  # waits until process 0 listens
        fail(case)
    pipe = open(sys.argv[0] + ".pipe")
    if case == "start":
        with ended_by_signals():
            signal.pause()
    pipe.read()  # until process 1 is gone, as a collective waits
    raise LostProcess("process 0 lost another process (broken pipe)")
run_main(main)
"""
CAUSES = [
    ("input", EXIT_BAD_INPUT, "error: shard x.tar is damaged: write it again"),
    (
        "disk",
        EXIT_BAD_INPUT,
        "error: x.tar: No space left on device: check the path, its permissions and the free space",
    ),
    ("bug", EXIT_LOST, "error: KeyError: 'bug'"),
    ("killed", EXIT_LOST, "error: process 1 was ended by SIGKILL: start again to go on"),
    ("start", EXIT_BAD_INPUT, "error: checkpoint x cannot be read here"),
]
"""What befalls process 1 alone, and how the launcher ends by it; in `start` before the others listen to each other."""


def launch(
    command: list[str], case: str, tmp_path: Path, text: str = WRONG, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Start a script by a launcher, which is forked; `fresh`: as a user starts it."""
    script = tmp_path / "wrong.py"
    script.write_text(text)
    os.mkfifo(f"{script}.pipe")
    words = [*command, str(script), case]
    if not fresh:
        return forked.run(words[1:], environment(), timeout=120)
    return subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("case", "code", "last"),
    [
        ("everywhere", EXIT_BAD_INPUT, "error: --data x is no folder: name another"),
        ("second", EXIT_BAD_INPUT, "error: --data x is no folder: name another"),
        ("killed", EXIT_LOST, "error: process 1 was ended by SIGKILL: start again to go on"),
        ("saved", EXIT_SIGNALLED, ""),
        ("well", 0, ""),
    ],
)
def test_ours_ends_with_the_sentence_and_the_exit_code(case: str, code: int, last: str, tmp_path: Path) -> None:
    """`second`: of a process that is not the first, which says what all find."""
    done = launch(OURS, case, tmp_path, fresh=case == "second")
    assert done.returncode == code
    found = [line for line in done.stderr.splitlines() if not line.startswith("interrupted: ")]  # by the launcher
    assert found == ([last] if last else [])
    assert done.stderr.endswith(last and f"{last}\n")


@pytest.mark.parametrize(("case", "code", "last"), CAUSES)
def test_ours_ends_with_the_cause_and_not_with_what_followed(case: str, code: int, last: str, tmp_path: Path) -> None:
    done = launch(OURS, case, tmp_path, LOST)
    *_, before, sentence = done.stderr.strip().splitlines()
    assert (done.returncode, sentence) == (code, last)
    assert case == "start" or "error: process 0 lost another process" in before


@pytest.mark.parametrize("case", ["input", "bug", "start"])
def test_torchrun_takes_the_cause_for_the_root_cause(case: str, tmp_path: Path) -> None:
    done = launch(torchrun(2), case, tmp_path, LOST)
    sentence = next(last for of, _, last in CAUSES if of == case)
    assert done.stderr.strip().splitlines()[-2] == f"  traceback : {sentence}"


@pytest.mark.slow
def test_an_error_on_one_process_in_mid_run_is_the_last_sentence(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    script = tmp_path / "full.py"
    script.write_text(
        "import os, sys\n"
        "from cmgan_dist.errors import run_main\n"
        "from cmgan_dist.training import loop\n"
        "from launchers.train import main\n"
        "def full(*_):\n"
        "    raise OSError(28, 'No space left on device', 'x')\n"
        "if os.environ['RANK'] == '1':\n"
        "    loop.record_batch = full\n"
        "run_main(main)\n"
    )
    words = [*OURS, str(script), *train_words(feature_data(), tmp_path / "run")[1:]]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_BAD_INPUT
    assert "error: process 0 lost another process at sample" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: x: No space left on device")


@pytest.mark.parametrize("config", ["zero2.yaml", "ddp.yaml"])
def test_ours_ends_with_the_sentence_under_deepspeed_too(config: str, tmp_path: Path) -> None:
    file = str(ROOT / "launchers" / "configs" / config)
    words = [*OURS, "--config_file", file, "launchers/train.py", "--preset", "reference", "--output", str(tmp_path)]
    words += ["--data", str(tmp_path / "x")]
    done = forked.run(words[1:], environment(), timeout=120)
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: data folder {tmp_path / 'x'} does not exist")
    assert "Traceback" not in done.stderr


def test_a_configuration_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = launch([*OURS, "--config_file", "none.yaml"], "well", tmp_path)
    assert (done.returncode, done.stderr) == (
        EXIT_BAD_INPUT,
        "error: --config_file none.yaml does not exist: check the path\n",
    )


UNUSED = """
distributed_type: DEEPSPEED
mixed_precision: bf16
num_processes: 2
dynamo_config: {dynamo_backend: INDUCTOR}
deepspeed_config: {zero_stage: 1, gradient_accumulation_steps: 4, gradient_clipping: 1.0}
"""


def test_what_a_configuration_says_and_is_not_used_is_logged_as_under_accelerate(tmp_path: Path) -> None:
    file, script = tmp_path / "accelerate.yaml", tmp_path / "say.py"
    file.write_text(UNUSED)
    script.write_text("from cmgan_dist.distributed.join import say_unused\nsay_unused('fp16')\n")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    said = []
    for start in (OURS, accelerate):
        words = [*start, "--config_file", str(file), str(script)]
        done = forked.run(words[1:], environment(), timeout=120)
        assert done.returncode == 0
        said.append([line for line in done.stderr.splitlines() if "is not used: set" in line])
    assert said[0] == [
        "accelerate's mixed_precision bf16 is not used: set train.precision",
        "accelerate's dynamo_backend inductor is not used: set train.compile",
        "accelerate's gradient_accumulation_steps 4 is not used: set optim.accumulate",
        "accelerate's gradient_clipping 1.0 is not used: set optim.clip",
    ]
    assert set(said[1]) == set(said[0]) - {said[0][1]}  # accelerate itself loses dynamo's under DeepSpeed


def test_a_kind_that_is_a_list_is_one_sentence_and_a_cpu_may_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: [DEEPSPEED]")
    with pytest.raises(BadInput, match=r"has distributed_type \['DEEPSPEED'\]: set it to DEEPSPEED or MULTI_GPU"):
        launch_environment(str(file))
    file.write_text("distributed_type: MULTI_CPU\nuse_cpu: true")
    assert launch_environment(str(file)) == {"ACCELERATE_USE_CPU": "true"}


def test_processes_that_only_the_configuration_counts_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(UNUSED)
    done = launch([*OURS[:-2], "--config_file", str(file)], "well", tmp_path)
    assert (done.returncode, done.stderr.startswith("error: --config_file ")) == (EXIT_BAD_INPUT, True)
    assert "has num_processes 2: say it as --nproc_per_node" in done.stderr


def test_sharding_by_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInput, match="asks for FSDP, which is not used"):
        say_unused("fp32")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_ours_passes_a_signal_on_and_ends_with_what_the_processes_do(number: int, tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "from os import environ\n"
        "def save(*_):\n"
        "    pathlib.Path(sys.argv[1], 'saved-' + environ['RANK']).touch()\n"
        "    sys.exit(85)\n"
        "for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, save)\n"
        "pathlib.Path(sys.argv[1], 'ready-' + environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )
    words = [*OURS, str(script), str(tmp_path)]
    process = forked.Forked(words[1:], environment())
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, 90)
    os.kill(process.pid, number)
    done = process.wait(60)
    assert done.returncode == EXIT_SIGNALLED
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert done.stderr.strip().splitlines()[-1].endswith("passed on to all processes: start again to go on")
    assert "Traceback" not in done.stderr


def test_a_launcher_that_waits_for_another_machine_ends_at_a_signal(tmp_path: Path) -> None:
    words = [*OURS[:3], "--nnodes", "2", "--node_rank", "1", "--master_addr", "127.0.0.1"]
    words += ["--master_port", str(free_port()), "none.py"]
    with subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text(), 60)
        time.sleep(3)  # it has come to wait
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_SIGNALLED
    assert said.splitlines()[-1] == "SIGTERM came before training began: start again"


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (["--node_rank", "1"], "The client socket has timed out"),
        (["--node_rank", "0"], "Timed out after"),
    ],
)
def test_machines_that_do_not_meet_are_one_sentence(node: list[str], reason: str, tmp_path: Path) -> None:
    words = [*OURS[:3], "--nnodes", "2", *node, "--master_addr", "127.0.0.1"]
    done = launch([*words, "--master_port", str(free_port()), "--rdzv-conf", "timeout=3"], "well", tmp_path)
    assert done.returncode == EXIT_BAD_INPUT
    assert f"error: the machines of the run could not meet ({reason}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_options_of_torchrun_that_are_wrong_are_one_sentence(tmp_path: Path) -> None:
    done = launch([*OURS[:-1], "abc"], "well", tmp_path)
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.strip().splitlines() == ["error: Unsupported nproc_per_node value: abc: see torchrun --help"]


def test_torchrun_ends_its_report_with_the_sentence(tmp_path: Path) -> None:
    """DeepSpeed's launcher and that of accelerate for several GPUs are the same code."""
    done = launch(torchrun(2), "second", tmp_path)
    *_, sentence, border = done.stderr.strip().splitlines()
    assert sentence == "  traceback : error: --data x is no folder: name another"
    assert set(border) == {"="}


def test_quiet_leaves_the_sentence_alone(tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "2"]
    words = [*accelerate, "launchers/train.py", "--preset", "smoke", "--data", str(tmp_path / "x"), "--output", "y"]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: data folder {tmp_path / 'x'} does not exist")
    assert "Traceback" not in done.stderr


def test_an_error_is_left_for_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))

    def fail() -> None:
        raise BadInput("no")

    for path in (str(report), str(tmp_path / "nowhere" / "error.json")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        with pytest.raises(SystemExit) as ended:
            run_main(fail)
        assert ended.value.code == EXIT_BAD_INPUT
    assert json.loads(report.read_text())["message"] == "error: no"
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]
