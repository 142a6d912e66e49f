"""Whole searches on a real Ray cluster of two nodes: results, failures, kill -9, resume, signals, PBT, DDP, s3."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from cmgan_dist.errors import BadInput
from tests.services import forked
from tests.toy import make_features
from tests.tune.search_cases import OBJECT_STORE, RATES, arguments, read
from tune.options import Arguments
from tune.search import search
from tune.space import Space
from tune.tuner import cpus_of_trial, make_search

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(tmp_path_factory.mktemp("search") / "data")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes with one CPU each."""
    nodes = Cluster()
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(config: Path, output: Path, *extra: str) -> list[float]:
    """Validation scores of launchers/train.py with a config file."""
    words = [str(ROOT / "launchers" / "train.py"), "--config", str(config), "--output", str(output)]
    done = forked.run([*words, "train.threads=1", "train.report=false", *extra], environment())
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["score"] for line in lines if line["kind"] == "val"]


def test_a_small_search_ends_in_a_config_that_trains_to_the_same_scores(
    tmp_path: Path, data: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(arguments(tmp_path, data, cluster)) == 0
    output = tmp_path / "search"
    found = read(output)
    first, second = found["trials"]
    assert first["name"] == "preset"
    assert first["values"] == {"optim.generator_lr": 0.001, "loss.inter": 1.0, "model.dropout": 0.0}
    assert 5e-4 <= second["values"]["optim.generator_lr"] <= 5e-3
    assert first["node"] != second["node"], "both trials ran on one of the two nodes"
    # asha with two rungs at 1 and 2 validations: a trial ends at a rung, or with the run
    assert all(len(t["curve"]) in (1, 2, 3) and t["status"] in ("ended", "stopped early") for t in (first, second))
    best = max((first, second), key=lambda t: t["best"])
    assert best["status"] == "ended"
    assert found["best"] == best["name"]
    assert best["best"] == max(score for _, score in best["curve"])
    # the trial's training is that of launchers/train.py, bit by bit
    config = yaml.safe_load((output / "best.yaml").read_text())
    assert config["optim"]["generator_lr"] == best["values"]["optim.generator_lr"]
    assert train(output / "best.yaml", tmp_path / "again") == [score for _, score in best["curve"]]
    # the test split was read for the best: by the folder that it left
    words = [str(ROOT / "launchers" / "evaluate.py"), str(output / "best"), "--json", "--no-baselines"]
    done = forked.run(words, environment())
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])["metrics"]
    assert found["test"]["scores"]["map/mean"] == [pytest.approx(metrics["map/mean"], abs=1e-12), 0.0]
    report = (output / "report.html").read_text()
    assert report.count("<svg") == 2
    assert "Best trials" in report
    assert list((output / "search").glob("*/events.out.tfevents.*")), "nothing for TensorBoard"
    assert "The best of 2 trials" in capsys.readouterr().out
    # the same output again
    with pytest.raises(BadInput, match="add --resume"):
        search(arguments(tmp_path, data, cluster))
    with pytest.raises(BadInput, match="has trials 2, not 3"):
        search(arguments(tmp_path, data, cluster, trials=3, resume=True))
    assert search(arguments(tmp_path, data, cluster, resume=True)) == 0
    assert [t["curve"] for t in read(output)["trials"]] == [t["curve"] for t in found["trials"]]


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(tmp_path: Path, data: Path, cluster: str) -> None:
    # decoupled decay of 1000 at a rate of 1000 multiplies the weights by a million a step
    space = "optim.weight_decay: [0.0, 1000.0]\noptim.generator_lr: [1000.0]\n"
    given = arguments(tmp_path, data, cluster, space, trials=5, algorithm="random", test=False)
    given.epochs, given.val_every = 10.0, 5.0
    assert search(given) == 0
    found = read(tmp_path / "search")
    failed = [t for t in found["trials"] if t["values"]["optim.weight_decay"]]
    assert 0 < len(failed) < 5
    for trial in failed:
        assert trial["status"] == "failed"
        assert "lower optim.generator_lr" in trial["failed"]
    assert all(t["status"] == "ended" for t in found["trials"] if t not in failed)
    assert found["test"] == {}
    assert "lower optim.generator_lr" in (tmp_path / "search" / "report.html").read_text()


def test_a_trial_that_fits_no_node_is_refused(tmp_path: Path, data: Path, cluster: str) -> None:
    with pytest.raises(BadInput, match="does not fit"):
        search(arguments(tmp_path, data, cluster, cpus=64.0))


def start(tmp_path: Path, data: Path, *extra: str, **options: Any) -> subprocess.Popen[str]:
    """The command line, with a Ray of its own."""
    (tmp_path / "space.yaml").write_text(RATES)
    command = [sys.executable, str(ROOT / "tune" / "search.py"), "--preset", "smoke", "--data", str(data)]
    command += ["--output", str(tmp_path / "search"), "--space", str(tmp_path / "space.yaml"), "--epochs", "200"]
    command += ["--val-every", "10", "--trials", "3", "--algorithm", "random", "--concurrent", "2", *extra]
    # without the repository on the path: a clone is enough
    environ = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> Any:
    deadline = time.monotonic() + 240
    while not (found := condition()):
        assert process.poll() is None, f"ended before {what}: {process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
    return found


def is_ours(process: psutil.Process) -> bool:
    """A training process, or a worker that Ray runs trials in; Ray's own agents take their time."""
    try:
        words = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "tune.worker" in words or "ImplicitFunc" in words or "ray::Trial" in words or "raylet" in words


def results(output: Path, start: str = "search") -> list[list[dict[str, Any]]]:
    """The lines that Tune keeps of each trial that has any."""
    texts = [file.read_text() for file in sorted((output / start).glob("*/result.json"))]
    return [[json.loads(line) for line in text.split("\n")[:-1]] for text in texts if "\n" in text]


def far_enough(output: Path) -> bool:
    found = results(output)
    return len(found) >= 2 and all(len(lines) >= 4 for lines in found)


def curves(output: Path) -> list[Any]:
    return [t["curve"] for t in read(output)["trials"]]


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_resume_goes_on_exactly(
    tmp_path: Path, data: Path, cluster: str
) -> None:
    output = tmp_path / "search"
    process = start(tmp_path, data, start_new_session=True)
    wait_for(lambda: far_enough(output), process, "four validations of two trials")
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if is_ours(p)]
    assert family
    process.kill()
    process.wait()
    before = results(output)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [p.cmdline() for p in alive]
    resumed = start(tmp_path, data, "--resume")
    _, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors[-3000:]
    after = read(output)["trials"]
    assert [t["status"] for t in after] == ["ended"] * 3
    # nothing but the last interval was done again
    went_on = sorted(lines[0]["validation"] for lines in results(output, "search-2"))
    begun = sorted(lines[-1]["validation"] for lines in before)
    assert went_on[0] == 1, "the third trial"
    for old, new in zip(begun, went_on[1:], strict=True):
        assert old - 1 <= new <= old + 1
    # and every trial ends as if nothing had happened
    calm = arguments(tmp_path, data, cluster, trials=3, algorithm="random", epochs=200.0, val_every=10.0)
    calm.output = str(tmp_path / "calm")
    assert search(calm) == 0
    assert curves(tmp_path / "calm") == curves(output)


@pytest.mark.slow
def test_killed_workers_and_training_processes_start_again_from_their_last_checkpoint(
    tmp_path: Path, data: Path
) -> None:
    output = tmp_path / "search"
    process = start(tmp_path, data)
    wait_for(lambda: far_enough(output), process, "four validations of two trials")

    def parts(name: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if name in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    servers = parts("tune.worker")
    parents = {p.ppid() for p in servers}
    actor = next(psutil.Process(pid) for pid in parents if pid not in {p.pid for p in servers})
    training = next(p for p in servers if p.ppid() in {s.pid for s in servers} and p.parents()[1].pid != actor.pid)
    below = actor.children(recursive=True)
    actor.kill()
    training.kill()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive, "training went on without its worker"
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    found = read(output)["trials"]
    assert [t["status"] for t in found] == ["ended"] * 3
    assert all([epoch for epoch, _ in t["curve"]] == [10.0 * k for k in range(1, 21)] for t in found)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_the_best_so_far(number: int, tmp_path: Path, data: Path) -> None:
    output = tmp_path / "search"
    process = start(tmp_path, data)
    wait_for(lambda: far_enough(output), process, "four validations of two trials")
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if is_ours(p)]
    process.send_signal(number)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 85, errors[-3000:]
    assert "--resume goes on" in said
    found = read(output)
    assert found["interrupted"]
    assert found["test"] == {}, "the test split is for the end"
    best = max(found["trials"], key=lambda t: t["best"])
    assert len(best["curve"]) >= 4
    assert best["status"] == "unfinished"
    assert yaml.safe_load((output / "best.yaml").read_text())["loss"]["inter"] == best["values"]["loss.inter"]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [p.cmdline() for p in alive]


@pytest.mark.slow
def test_confirmation_over_new_seeds_decides(tmp_path: Path, data: Path, cluster: str) -> None:
    given = arguments(tmp_path, data, cluster, trials=4, confirm=2, confirm_top=2)
    assert search(given) == 0
    found = read(tmp_path / "search")
    confirmed = found["confirmed"]
    assert "preset" in [c["name"] for c in confirmed]
    assert len(confirmed) in (2, 3)
    top = max(confirmed, key=lambda c: c["mean"])
    assert found["best"] == top["name"]
    assert found["test"]["seeds"] == 2
    # a confirming run is a run of launchers/train.py from seed 1, and from seed 2
    best = tmp_path / "search" / "best.yaml"
    scores = [max(train(best, tmp_path / f"seed{seed}", f"train.seed={seed}")) for seed in (1, 2)]
    assert scores == top["scores"]


@pytest.mark.slow
def test_pbt_clones_checkpoints_and_mutates(tmp_path: Path, data: Path, cluster: str) -> None:
    given = arguments(tmp_path, data, cluster, trials=4, algorithm="pbt", epochs=8.0, grace=2, test=False)
    assert search(given) == 0
    found = read(tmp_path / "search")
    assert [t["status"] for t in found["trials"]] == ["ended"] * 4
    files = (tmp_path / "search" / "search").glob("pbt_policy_*.txt")
    log = [line for file in files for line in file.read_text().splitlines()]
    assert log, "nothing was cloned"
    for line in log:
        *_, before, after = json.loads(line)
        assert before != after
        assert 5e-4 <= after["optim.generator_lr"] <= 5e-3
        assert after["model.dropout"] <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["optuna", "optuna-both", "hyperband"])
def test_the_other_algorithms(algorithm: Any, tmp_path: Path, data: Path, cluster: str) -> None:
    given = arguments(tmp_path, data, cluster, trials=4, algorithm=algorithm, test=False)
    assert search(given) == 0
    found = read(tmp_path / "search")
    assert len(found["trials"]) == 4
    assert all(t["curve"] for t in found["trials"])
    assert found["trials"][0]["values"]["optim.generator_lr"] == 0.001
    assert len({t["values"]["optim.generator_lr"] for t in found["trials"]}) == 4


@pytest.mark.slow
def test_two_processes_in_a_trial_score_as_one(tmp_path: Path, data: Path, cluster: str) -> None:
    given = arguments(tmp_path, data, cluster, trials=1, processes=2)
    assert search(given) == 0
    (trial,) = read(tmp_path / "search")["trials"]
    log = next((tmp_path / "search" / "best").glob("train.log")).read_text()
    assert "2 processes on cpu" in log
    assert "32 samples a batch each" in log
    alone = train(tmp_path / "search" / "best.yaml", tmp_path / "alone")
    assert [score for _, score in trial["curve"]] == pytest.approx(alone, abs=2e-3)


@pytest.mark.slow
def test_output_in_an_object_store(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// by moto; trials, checkpoints, results and --resume."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("searches")
        given = arguments(tmp_path, data, "", output="s3://searches/one")
        assert search(given) == 0
        assert search(arguments(tmp_path, data, "", output="s3://searches/one", resume=True)) == 0
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        found = json.loads(fs.cat_file("searches/one/trials.json"))
        assert len(found["trials"]) == 2
        assert fs.exists("searches/one/best/best/model.safetensors")
        (tmp_path / "best.yaml").write_bytes(fs.cat_file("searches/one/best.yaml"))
        best = max(found["trials"], key=lambda t: t["best"])
        assert train(tmp_path / "best.yaml", tmp_path / "again") == [score for _, score in best["curve"]]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"preset": ""}, "either --preset or --config"),
        ({"config": "x.yaml"}, "either --preset or --config"),
        ({"preset": "smokey"}, "did you mean 'smoke'"),
        ({"data": ""}, "--data is missing"),
        ({"output": ""}, "--output is missing"),
        ({"data": "nowhere"}, "nowhere"),
        ({"test_split": "tset"}, "tset"),
        ({"trials": 0}, "--trials is 0"),
        ({"gpus": 1.0, "processes": 2}, "too few for --processes 2"),
        ({"output": "nosuch://x"}, "--output nosuch://x cannot be opened"),
    ],
)
def test_bad_input_is_one_sentence(changed: dict[str, Any], sentence: str, tmp_path: Path, data: Path) -> None:
    """Said before there is a Ray: nobody listens at the address."""
    with pytest.raises(BadInput) as caught:
        search(dataclasses.replace(arguments(tmp_path, data, "127.0.0.1:9"), **changed))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("algorithm", ["asha", "random", "optuna", "optuna-both", "hyperband", "pbt"])
def test_every_algorithm_keeps_to_the_trials_at_a_time(algorithm: Any) -> None:
    """By the limit of what makes trials, or by the CPUs of each: of 8 CPUs, 2 trials of 1 CPU leave 4 to each."""
    arguments = Arguments(preset="smoke", algorithm=algorithm, concurrent=2)
    space: Space = {"optim.generator_lr": {"log": [1e-4, 1e-2]}}
    made = make_search(space, arguments, {}, [{"optim.generator_lr": 1e-3}])
    by_cpus = 8 / cpus_of_trial(arguments, 8.0)
    by_maker = getattr(made, "max_concurrent", 0) or (2 if algorithm.startswith("optuna") else 8)
    assert min(by_cpus, by_maker) == 2
