"""A SLURM of two virtual nodes on this machine: munged, slurmctld and two slurmd, stopped by their pid files.

Each slurmd runs in a session of its own; nothing of an installed SLURM's configuration is read or changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1
JobRequeue=1
KillWait=60
SlurmdTimeout=10
InactiveLimit=0
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=60 OverTimeLimit=0 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=node1,node2 MaxTime=60 State=UP PriorityTier=2
"""


def install() -> str:
    """Install SLURM where it is missing; "" or why it cannot be had."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    if all(shutil.which(p) for p in PROGRAMS):
        return ""
    if shutil.which("apt-get") is None:
        return "slurm-wlm and munge are not installed and there is no apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(Path(tempfile.gettempdir()) / "cmgan-dist-slurm-install", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's processes install one after the other; the second finds it done
        for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
            if all(shutil.which(p) for p in PROGRAMS):
                return ""
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=400, check=False
            )
            if done.returncode:
                return f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_cluster(base: Path) -> Iterator[Cluster]:
    """Skips where `install` says why there can be none; ends the cluster and its processes whatever happens."""
    missing = install()
    if missing:
        pytest.skip(f"no SLURM: {missing}")
    cluster = Cluster(base)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        wait_for("end of the cluster's processes", lambda: not cluster.processes())


def wait_for(what: str, check: Callable[[], object], seconds: float = 400) -> None:
    """Poll until `check` is true; TimeoutError names `what`."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {seconds:.0f} s")
        time.sleep(0.1)


class Cluster:
    """Everything under `base`; `start`, then `stop` whatever happened."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environment = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        for name in [n for n in self.environment if n.startswith("SLURM") and n != "SLURM_CONF"]:
            del self.environment[name]

    # ------------------------------------------------------------------------------------------ daemons

    def start(self) -> None:
        self.end_abandoned()
        for name in ("state", "run", "log", "munge", *(f"spool/{n}" for n in NODES)):
            (self.base / name).mkdir(parents=True)
        ports = {"port": free_port(), "port1": free_port(), "port2": free_port()}
        # Jobs meet at a port that is their number's: two clusters on this machine must not count alike. Those of one
        # run of the tests are a thousand apart; an earlier run's may still end.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        ports["first_job"] = (worker % 4 + 1) * 1000 + random.randrange(900)
        text = CONFIG.format(host=socket.gethostname().split(".")[0], base=self.base, **ports)
        (self.base / "slurm.conf").write_text(text)
        (self.base / "owner.pid").write_text(str(os.getpid()))
        key = self.base / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._do("munged", "--force", *(f"--{name}={self.base}/munge/{file}" for name, file in files.items()))
        self._do("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def _do(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")

    def start_node(self, node: str) -> None:
        self._do("slurmd", "-N", node)

    def wait_idle(self) -> None:
        command = ("sinfo", "-h", "-N", "-p", "main", "-o", "%T")
        wait_for("idle nodes", lambda: self.run(*command).split() == ["idle"] * len(NODES))

    def pid(self, name: str) -> int | None:
        """Of munged, slurmctld or a node's slurmd, if it runs."""
        path = self.base / ("munge/pid" if name == "munged" else f"run/{name}.pid")
        if not path.exists() or not path.read_text().strip():
            return None
        pid = int(path.read_text())
        return pid if psutil.pid_exists(pid) else None

    @staticmethod
    def _environment(process: psutil.Process) -> dict[str, str]:
        try:
            return process.environ()
        except psutil.Error:
            return {}

    def kill_node(self, node: str) -> None:
        """What a power cut does to it, as far as its processes go."""
        pid = self.pid(f"slurmd-{node}")
        tasks = [p for p in self.training() if self._environment(p).get("SLURMD_NODENAME") == node]
        steps = {a.pid: a for p in tasks for a in p.parents() if a.name() == "slurmstepd"}
        daemons = [*([psutil.Process(pid)] if pid else []), *steps.values()]
        # by process group: srun hides its environment, and its second process has no parent
        groups = {os.getpgid(child.pid) for step in steps.values() for child in step.children(recursive=True)}
        members = [p for p in psutil.process_iter() if psutil.pid_exists(p.pid) and os.getpgid(p.pid) in groups]

        def send(number: int, processes: list[psutil.Process]) -> None:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

        # The daemons stand still first, to report nothing, and die last: an srun whose parent is gone asks the
        # controller to end the step, which would end the next start's.
        send(signal.SIGSTOP, daemons)
        send(signal.SIGKILL, members)
        send(signal.SIGKILL, daemons)

    def stop(self) -> None:
        if self.pid("slurmctld"):
            self.run("scancel", "-u", "root", check=False)
            with contextlib.suppress(TimeoutError):  # what does not end by itself is killed below
                wait_for("empty queue", lambda: not self.run("squeue", "-h", check=False), 90)
        names = [*(f"slurmd-{n}" for n in NODES), "slurmctld", "munged"]
        processes = [psutil.Process(pid) for name in names if (pid := self.pid(name))]
        for process in processes:
            process.terminate()
        for process in psutil.wait_procs(processes, timeout=15)[1]:
            process.kill()
        for process in self.processes():
            process.kill()

    def end_abandoned(self) -> None:
        """Kill the clusters of test sessions that were killed before they could stop them."""
        for process in psutil.process_iter():
            owner = Path(self._environment(process).get("SLURM_CONF", "")).parent / "owner.pid"
            if owner.is_file() and not psutil.pid_exists(int(owner.read_text())):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def processes(self) -> list[psutil.Process]:
        """All that this cluster started and that still lives: they have its SLURM_CONF in their environment."""
        mine = str(self.base / "slurm.conf")
        return [
            p for p in psutil.process_iter() if p.pid != os.getpid() and self._environment(p).get("SLURM_CONF") == mine
        ]

    # ------------------------------------------------------------------------------------------ commands

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit_array(self, *words: str, output: Path, **variables: str) -> str:
        """Submit an array by sbatch's `words`, whose tasks write to `output`/TASK.out; returns the job's number.

        `variables`: more of the environment that the tasks get."""
        usual = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            ["sbatch", f"--output={output}/%a.out", *words],
            env={**self.environment, **usual, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.split()[-1]

    def check_array(self, job: str, tasks: range, requeued: int, output: Path, seconds: float) -> dict[str, str]:
        """Wait up to `seconds` for the end of an array; returns what each task wrote.

        Every one must have completed, and the one that was `requeued` have begun once more."""
        wait_for("end of the array", lambda: self.run("squeue", "-h") == "", seconds)
        said = {path.stem: path.read_text() for path in output.glob("*.out")}
        states = {task: self.job(f"{job}_{task}") for task in tasks}
        assert {state["JobState"] for state in states.values()} == {"COMPLETED"}, said
        assert states[requeued]["Restarts"] == "1"
        return said

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job`, one name and value each."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def training(self) -> list[psutil.Process]:
        """Launchers, ranks and batch scripts that live: whatever stands in a job of this cluster."""
        return [p for p in self.processes() if "SLURM_JOB_ID" in self._environment(p)]
