"""A run is evaluated on data that fits it, alike on one process and several; other data is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cmgan_dist
from cmgan_dist.config.fields import DATA_SEPARATOR
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.stream import Stream
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.errors import BadInput
from cmgan_dist.models.saved import load_generator, read_model
from cmgan_dist.report.record import read_evaluation
from cmgan_dist.report.run import write_report
from cmgan_dist.retrieval.embed import embed_split
from cmgan_dist.retrieval.embed_job import check_source
from cmgan_dist.retrieval.embed_source import open_source
from cmgan_dist.retrieval.evaluate import open_task, parse_record
from cmgan_dist.retrieval.hub import find_evaluation
from cmgan_dist.retrieval.metrics import Embeddings
from cmgan_dist.retrieval.metrics import evaluate as evaluate_embeddings
from launchers import evaluate as launcher
from tests.services import forked
from tests.toy import ROOT, call, environment, save_untrained, small_config


def test_the_metrics_are_those_of_the_embedded_split(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data, config = feature_data(), small_config(8)
    save_untrained(tmp_path / "run", data, config)
    generator = load_generator(read_model(tmp_path / "run"))
    split = embed_split(generator, ShardReader(str(data), "test"), config, Parallel())
    common = Embeddings(split.image.common, split.text.common, split.owner, split.labels)
    assert cmgan_dist.evaluate(tmp_path / "run", str(data)) == evaluate_embeddings(common, "cosine")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dims": (9, 7)}, "the images of .* are features of 9 numbers, those that .* are features of 12 numbers"),
        ({"dims": (12, 3)}, "the texts of .* are features of 3 numbers"),
        ({"classes": 4}, r"has other classes than .* \(class 3 is 'class 3', not 'none'\)"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    options: dict[str, object], said: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    with pytest.raises(BadInput, match=said):
        open_task(tmp_path / "run", str(feature_data("other", **options)))


def test_raw_data_is_refused_for_a_run_on_features(
    feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    with pytest.raises(BadInput, match=r"are raw, those that .* are features of 12 numbers"):
        open_task(tmp_path / "run", str(raw_data()))


PIXELS = {"backbone": "resnet50", "weights": "hub", "weights_sha256": "a" * 64, "image_size": 224, "mean": [0.5] * 3}
TEXTS = {"backbone": "sentence", "weights": "hub", "weights_sha256": "b" * 64, "max_tokens": 64, "pools": ["max"]}


def with_details(data: Path, details: dict[str, object]) -> Path:
    manifest = load_manifest(data)
    manifest.details = details
    (data / "manifest.json").write_text(manifest.to_json())
    return data


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"text": TEXTS | {"pools": ["cls"]}}, r"text features of .*other.* \(text pools cls, not max\)"),
        ({"image": PIXELS | {"backbone": "vit"}}, r"image features of .*other.* \(backbone vit, not resnet50\)"),
        ({"image": PIXELS | {"weights_sha256": "c" * 64}}, r"SHA-256 c{12}…, not a{12}…\)"),
        ({"image": PIXELS | {"image_size": 384}}, r"image features of .*other.* \(image size 384, not 224\)"),
        ({"image": PIXELS | {"mean": [0.4] * 3}}, r"\(pixel mean 0.4,0.4,0.4, not 0.5,0.5,0.5\)"),
        ({"text": TEXTS | {"max_tokens": 128}}, r"text features of .*other.* \(max tokens 128, not 64\)"),
        ({"image": PIXELS, "text": TEXTS | {"weights": "/elsewhere"}}, ""),
        ({"image": {k: v for k, v in PIXELS.items() if k != "image_size"}}, ""),
        ({"image": 5, "text": {"pools": None}}, ""),
        ({}, ""),
    ],
)
def test_features_that_are_made_otherwise_are_refused_where_both_sides_know(
    made: dict[str, object], said: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    mine = with_details(feature_data(), {"image": PIXELS, "text": TEXTS})
    theirs = with_details(feature_data("other"), made)
    save_untrained(tmp_path / "run", mine, small_config(8))
    stream = dataclasses.replace(small_config(8).stream, logical_streams=4)
    for work in (
        lambda: open_task(tmp_path / "run", str(theirs)),
        lambda: check_source(read_model(tmp_path / "run"), open_source("shards", str(theirs), stream)),
        lambda: Stream(f"{mine}{DATA_SEPARATOR}{theirs}", stream, seed=0),
    ):
        with pytest.raises(BadInput, match=said) if said else contextlib.nullcontext():
            work()


def test_pairs_without_labels_are_evaluated_with_a_run_that_has_classes(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    metrics = cmgan_dist.evaluate(tmp_path / "run", str(feature_data("pairs", label_kind="none")))
    assert "recall/image_to_text@5" in metrics
    assert "map/mean" not in metrics


def launch(*words: str) -> None:
    """Run launchers/evaluate.py in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["evaluate.py", *words])
        launcher.main()


def evaluate_run(run: Path, *words: str, processes: int = 1) -> dict[str, object]:
    """The record that launchers/evaluate.py prints."""
    command = [str(ROOT / "launchers" / "evaluate.py"), str(run), "--json", "--no-baselines", *words]
    done = forked.run(command, environment(), processes)
    assert done.returncode == 0, done.stderr
    record: dict[str, object] = json.loads(done.stdout)
    return record


@pytest.mark.process
def test_two_processes_give_the_record_of_one_and_a_cut_record_is_made_anew(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save_untrained(run, feature_data(), small_config(8))
    one = evaluate_run(run)
    with np.load(run / "embeddings.npz") as file:
        first = dict(file)
    (run / "evaluation.json").write_text('{"metrics": {"ma')
    assert evaluate_run(run, processes=2) == one
    with np.load(run / "embeddings.npz") as file:
        for name, value in first.items():
            np.testing.assert_array_equal(file[name], value)
    assert parse_record((run / "evaluation.json").read_bytes()) == one


@pytest.mark.parametrize("change", [('"map/mean": 0.', '"map/mean": 0.9'), ('"map/mean"', '"map/meen"')])
def test_a_record_that_was_changed_is_made_anew_and_shown_nowhere(
    change: tuple[str, str], feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save_untrained(run, feature_data(), small_config(8))
    path = run / "evaluation.json"
    assert call(launcher.main, str(run), "--no-baselines") == (0, "")
    whole = path.read_text()
    path.write_text(whole.replace(*change, 1))
    assert path.read_text() != whole
    with pytest.raises(BadInput, match=r"evaluation\.json is not as it was written .*: evaluate the run again"):
        read_evaluation(path)
    assert find_evaluation(read_model(run)) == {}
    assert call(launcher.main, str(run), "--no-baselines") == (0, "")
    assert path.read_text() == whole
    assert find_evaluation(read_model(run))["metrics"] == read_evaluation(path)["metrics"]


def test_what_is_missing_or_of_another_evaluation_is_made_anew(
    feature_data: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save_untrained(run, feature_data(), small_config(8))
    words = [str(run), "--no-baselines"]
    assert call(launcher.main, *words, "--split", "val") == (0, "")
    of_val = (run / "embeddings.npz").read_bytes()
    assert call(launcher.main, *words) == (0, "")
    whole = {name: (run / name).read_bytes() for name in ("evaluation.json", "embeddings.npz", "report.html")}
    for name, left, said in (
        ("report.html", None, "report.html is missing"),
        ("embeddings.npz", None, "embeddings.npz is missing"),
        ("embeddings.npz", of_val, "embeddings.npz is not of this evaluation"),
    ):
        (run / name).unlink() if left is None else (run / name).write_bytes(left)
        capsys.readouterr()
        launch(*words)
        assert f"{said}: evaluating anew" in capsys.readouterr().err
        assert {name: (run / name).read_bytes() for name in whole} == whole
    capsys.readouterr()
    launch(*words)
    assert "already evaluated" in capsys.readouterr().err


def test_an_evaluation_that_was_killed_at_its_report_keeps_its_record_and_no_report_of_another(
    feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = tmp_path / "run"
    save_untrained(run, feature_data(), small_config(8))
    launch(str(run), "--no-baselines", "--split", "val")
    with monkeypatch.context() as patched:
        patched.setattr("cmgan_dist.report.run.write_report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            launch(str(run), "--no-baselines")
    assert read_evaluation(run / "evaluation.json")["split"] == "test"
    assert not (run / "report.html").exists()
    launch(str(run), "--no-baselines")
    assert "report.html is missing: evaluating anew" in capsys.readouterr().err
    assert (run / "report.html").exists()


@pytest.mark.parametrize("name", ["embeddings.npz", "evaluation.json", "report.html"])
def test_a_link_that_leads_nowhere_is_not_written_over(
    name: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save_untrained(run, feature_data(), small_config(8))
    (run / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(BadInput, match=rf"{name} is a link that leads nowhere: .* remove the link"):
        launch(str(run), "--no-baselines")
    assert (run / name).is_symlink()
    (run / name).unlink()
    launch(str(run), "--no-baselines")
    assert (run / name).is_file()


def test_a_report_leaves_out_an_evaluation_whose_model_is_gone(
    feature_data: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, data = tmp_path / "run", feature_data()
    save_untrained(run, data, small_config(8))
    launch(str(run), "--no-baselines")
    said = "of another model than best/ holds, and left out"
    assert said not in write_report(run).read_text()
    assert "<h2>Results</h2>" in write_report(run).read_text()
    save_untrained(run, data, small_config(8), seed=1)
    page = write_report(run).read_text()
    assert said in page
    assert f"evaluation.json is {said}" in caplog.text
    assert "<h2>Results</h2>" not in page
