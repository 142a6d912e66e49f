"""--resume goes on from the records of trials, which are plain JSON, and reads no pickle."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_sealed, sealed_json
from tests.launchers.damage_cases import DAMAGES, Damage, Planted, forbidden, missing
from tests.toy import make_features
from tests.tune.search_cases import OBJECT_STORE, arguments, read
from tune.progress import ProgressCallback
from tune.record import VERSION, Record, read_records, record_path
from tune.recorder import Recorder
from tune.results import FAILED
from tune.search import keep_best, search
from tune.space import SPACE, draw_settings

ROWS = [{"validation": k, "epoch": k, "score": 0.1 * k, "best": 0.1 * k, "step_s": 1.0} for k in (1, 2, 3)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    nodes = Cluster()
    nodes.add_node(num_cpus=2, object_store_memory=OBJECT_STORE)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


def plant(output: Path, trace: Path) -> int:
    """Put a pickle into the place of all that Ray has written, and beside every run; how many files those are."""
    bad = pickle.dumps(Planted(trace))
    state = json.dumps({"_type": "CLOUDPICKLE_FALLBACK", "value": bad.hex()})
    ours = [path for path in output.glob("search/*") if path.is_file()]
    for path in ours:
        path.write_bytes(state.encode() if path.suffix == ".json" else bad)
    runs = [path.parent for path in output.glob("search/*/*/metrics.jsonl")]
    assert runs
    for run in runs:
        for name in ("dict_checkpoint.pkl", ".tune_metadata", "error.pkl"):
            (run / name).write_bytes(bad)
            (run.parent / name).write_bytes(bad)
    return len(ours)


def cut(output: Path, number: int) -> None:
    """Make a record one of a trial that was killed before it reported its last validation."""
    path = output / "records" / "search" / f"{number:06d}.json"
    record = parse_sealed(path.read_bytes(), VERSION)
    record |= {"done": False, "validations": record["validations"][:-1]}
    path.write_text(sealed_json({"version": VERSION, **record}))


ALGORITHMS = [
    "random",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("asha", "optuna", "hyperband", "pbt")),
]
ALGORITHMS += [pytest.param("optuna-both", marks=pytest.mark.slow)]


@pytest.mark.process
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_search_goes_on_from_its_records_alone(algorithm: Any, cluster: str, tmp_path: Path) -> None:
    data, output = make_features(tmp_path / "data"), tmp_path / "search"
    given: dict[str, Any] = {"algorithm": algorithm, "trials": 3, "confirm": 1, "confirm_top": 1}
    assert search(arguments(tmp_path, data, cluster, **given)) == 0
    before = read(output)["trials"]
    assert plant(output, tmp_path / "trace") >= 3
    cut(output, 1)
    (output / "records" / "search" / "000002.json").unlink()
    (output / "records" / "confirm" / "000000.json").unlink()
    assert search(arguments(tmp_path, data, cluster, **given, resume=True)) == 0
    assert not (tmp_path / "trace").exists(), "a pickle was read"
    after = read(output)["trials"]
    assert len(after) == 3
    assert after[0]["curve"] == before[0]["curve"]
    assert len(list(output.glob("search-2/*/result.json"))) == 2
    if algorithm == "random":
        assert [t["curve"] for t in after] == [t["curve"] for t in before]
        assert [t["values"] for t in after] == [t["values"] for t in before]


@pytest.fixture
def output(tmp_path: Path) -> FileStore:
    output = FileStore(str(tmp_path), "--output")
    for number in range(2):
        rows = [{**row, "image_to_text": 0.1, "text_to_image": 0.1, "time_this_iter_s": 1.0} for row in ROWS]
        record = Record(number, {"loss.inter": 0.5}, rows, "node", True, "", "search/one/checkpoint_0", 3)
        output.write(f"records/search/{number:06d}.json", sealed_json({"version": VERSION, **record.__dict__}))
    return output


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d is not forbidden], ids=lambda damage: damage.__name__)
def test_a_damaged_record_is_named(damage: Damage, output: FileStore, tmp_path: Path) -> None:
    whole = read_records(output, "search")
    path = tmp_path / "records" / "search" / "000001.json"
    damage(path)
    if damage is missing or path.is_dir():  # that trial begins anew
        assert read_records(output, "search") == {0: whole[0]}
        return
    with pytest.raises(
        BadInput, match=r"records/search/000001.json (is damaged|cannot be read) .*, and its trial begins"
    ):
        read_records(output, "search")
    path.unlink()
    assert read_records(output, "search") == {0: whole[0]}


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint": "../outside"},
        {"checkpoint": "/outside"},
        {"number": "1"},
        {"values": [1]},
        {"validations": [{}]},
        {"validations": 5},
        {"more": 1},
    ],
)
def test_a_record_of_other_fields_is_named(fields: dict[str, Any], output: FileStore, tmp_path: Path) -> None:
    path = tmp_path / "records" / "search" / "000001.json"
    record = parse_sealed(path.read_bytes(), VERSION)
    path.write_text(sealed_json({"version": VERSION, **record, **fields}))
    with pytest.raises(BadInput, match=r"records/search/000001.json is damaged"):
        read_records(output, "search")


def test_settings_are_drawn_alike_and_first_comes_the_start() -> None:
    start = {"loss.inter": 1.0}
    first, *others = draw_settings(SPACE, 20, 3, start)
    assert first == start
    assert draw_settings(SPACE, 20, 3, start) == [first, *others]
    assert draw_settings(SPACE, 20, 4, start)[1:] != others
    assert json.loads(json.dumps(others)) == others
    assert draw_settings(SPACE, 30, 3, start)[:20] == [first, *others]


def test_a_trial_whose_process_died_too_often_is_recorded_and_tried_again(output: FileStore) -> None:
    known = read_records(output, "search")
    trial = SimpleNamespace(trial_id="a", config={"loss.inter": 0.5}, error_file="/a/error.txt", last_result={})
    trial.get_error = lambda: "Traceback\n  many lines\nmemory ran out"
    recorder, progress = Recorder(output, "search", [1], known, lambda: False), ProgressCallback("search", 2, 1)
    for callback in (recorder, progress):
        callback.on_trial_error(1, [trial], trial)
    record = read_records(output, "search")[1]
    assert (record.failed, record.finished) == ("its process died too often (memory ran out)", False)
    assert record.result("1", 3).status == FAILED
    result = {**record.last, "node": "n", "done": True, "failed": "it diverged"}
    recorder.on_trial_result(1, [trial], trial, result)
    assert read_records(output, "search")[1].finished


def test_a_trial_whose_folder_is_gone_begins_anew(
    output: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / record_path("search", 1)
    cut_short = parse_sealed(path.read_bytes(), VERSION) | {"done": False}
    path.write_text(sealed_json({"version": VERSION, **cut_short}))
    whole, anew = read_records(output, "search").values()
    assert (whole.finished, whole.checkpoint, len(whole.validations)) == (True, "search/one/checkpoint_0", 3)
    assert (anew.values, anew.checkpoint, anew.validations, anew.reached) == (whole.values, "", [], 0)
    assert f"{tmp_path}/search/one/checkpoint_0 is gone: its trial begins anew" in caplog.text
    output.write("search/one/checkpoint_0/config.yaml", "")
    assert read_records(output, "search")[1].checkpoint == "search/one/checkpoint_0"


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_best_run_that_is_gone_is_a_sentence_whose_advice_works(
    output: FileStore, tmp_path: Path, confirmed: bool
) -> None:
    plan: Any = SimpleNamespace(output=output, arguments=SimpleNamespace(test=False))
    outcome: Any = SimpleNamespace(best="1", runs={"1": [read_records(output, "search")[1]]}, confirmed=confirmed)
    record = tmp_path / record_path("confirm" if confirmed else "search", 1)
    with pytest.raises(BadInput, match=rf"checkpoint_0, a run of the best trial, is gone: .* remove {record}, and"):
        keep_best(plan, outcome)
    output.write("search/one/checkpoint_0/best/model.json", "one")  # restored
    keep_best(plan, outcome)
    assert output.read("best/best/model.json") == b"one"
    output.remove("search/one/checkpoint_0/best/model.json")
    output.write("trials.json", '{"best": "1"}')
    keep_best(plan, outcome)  # what is there is that run
    output.write("trials.json", '{"best": "0"}')
    with pytest.raises(BadInput, match="is gone"):
        keep_best(plan, outcome)
