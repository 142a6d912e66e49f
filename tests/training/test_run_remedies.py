"""What sentences on runs say to do leads out: a wrong start, its sentence, and one that follows it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.config.load import load_config
from cmgan_dist.retrieval.evaluate import open_task
from launchers import train
from tests.toy import SMALL, call, make_features

LOSSES = ("intra", "inter", "contrastive", "classification", "class_contrastive")


def start(data: Path, run: Path, *words: str) -> tuple[int, str]:
    return call(train.main, *SMALL, "--data", str(data), "--output", str(run), "train.epochs=1", *words)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs without labels."""
    return make_features(tmp_path_factory.mktemp("bare") / "data", label_kind="none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(tmp_path_factory.mktemp("data") / "data")


@pytest.mark.parametrize("word", ["eval.score=posterior", "eval.objective=class", "eval.objective=both"])
def test_a_score_that_needs_labels(word: str, bare: Path, tmp_path: Path) -> None:
    code, said = start(bare, tmp_path / "run", word)
    assert code == 2
    value = re.search("no labels: set it to (.*)", said)
    assert value, said
    assert start(bare, tmp_path / "run", f"{word.partition('=')[0]}={value[1]}") == (0, "")


def test_losses_that_need_labels(bare: Path, tmp_path: Path) -> None:
    words = [*(f"loss.{name}=0" for name in LOSSES), "loss.classification=1"]
    code, said = start(bare, tmp_path / "run", *words)
    names = re.search("set one of (.*) above 0", said)
    assert (code, bool(names)) == (2, True), said
    assert names
    for name in names[1].split(", "):
        assert start(bare, tmp_path / name, *words, f"{name}=0.5") == (0, ""), name


def other_version(run: Path) -> None:
    path = sorted(run.glob("checkpoints/*/state.json"))[-1]
    path.write_text(re.sub(r'"version": \d+', '"version": 2', path.read_text()))


def away(run: Path) -> None:
    shutil.move(sorted((run / "checkpoints").iterdir())[-1], run.parent / "away")


def link(run: Path) -> None:
    shutil.move(run / "checkpoints", run.parent / "kept")
    (run / "checkpoints").symlink_to("nowhere")


def unlink(run: Path) -> None:
    (run / "checkpoints").unlink()
    shutil.move(run.parent / "kept", run / "checkpoints")


def a_file(run: Path) -> None:
    shutil.move(run / "checkpoints", run.parent / "kept")
    (run / "checkpoints").write_text("")


def a_folder(run: Path) -> None:
    unlink(run)


def damage_all(run: Path) -> None:
    for path in run.glob("checkpoints/*/state.json"):
        path.rename(path.with_name("kept.json"))


def restore_one(run: Path) -> None:
    path = sorted(run.glob("checkpoints/*/kept.json"))[-1]
    path.rename(path.with_name("state.json"))


@pytest.mark.parametrize(
    ("damage", "said", "remedy"),
    [
        (other_version, "has version 2, .* or move it away to go back to the one before", away),
        (link, "is a link that leads nowhere: mount what it leads to, or remove the link", unlink),
        (a_file, "cannot be read .*: make it a readable folder", a_folder),
        (damage_all, "can be used .*: restore one, or begin anew by --resume never", restore_one),
    ],
)
def test_checkpoints(
    damage: Callable[[Path], None], said: str, remedy: Callable[[Path], None], data: Path, tmp_path: Path
) -> None:
    run, words = tmp_path / "run", ["train.save_every=0.5", "train.keep=2"]
    assert start(data, run, *words) == (0, "")
    damage(run)
    code, error = start(data, run, *words)
    assert (code, bool(re.search(said, error))) == (2, True), error
    remedy(run)
    assert start(data, run, *words) == (0, "")
    assert not (run / "earlier-1").exists()


def to_nowhere(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        if (run / name).exists():
            shutil.move(run / name, run.parent / "kept")
        (run / name).symlink_to(run.parent / "unmounted")

    return damage


def mounted(run: Path) -> None:
    """Where a link leads to is there again."""
    shutil.move(run.parent / "kept", run.parent / "unmounted")


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def best_is_a_file(run: Path) -> None:
    shutil.move(run / "best", run.parent / "kept")
    (run / "best").write_text("")


def metrics_are_a_folder(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


@pytest.mark.parametrize(
    ("damage", "said", "remedy"),
    [
        (to_nowhere("config.yaml"), "config.yaml is a link that leads nowhere: mount what it leads to", mounted),
        (to_nowhere("metrics.jsonl"), "metrics.jsonl is a link that leads nowhere: mount what it leads to", mounted),
        (to_nowhere("report.html"), "report.html is .* or remove the link", without("report.html")),
        (to_nowhere("best"), "best is .* or remove the link", without("best")),
        (to_nowhere("best/model.json"), "model.json is a link that leads nowhere: mount what it leads to", mounted),
        (best_is_a_file, "best is no folder: move it away", without("best")),
        (metrics_are_a_folder, "metrics.jsonl is no file: move it away", lambda run: (run / "metrics.jsonl").rmdir()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stands_in_the_place_of_a_runs_own_is_said_before_the_work(
    damage: Callable[[Path], None], said: str, remedy: Callable[[Path], None], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start(data, run) == (0, "")
    damage(run)
    before = sorted(run.rglob("*"))
    code, error = start(data, run, "train.epochs=2")
    assert (code, bool(re.search(said, error))) == (2, True), error
    assert sorted(run.rglob("*")) == before
    remedy(run)
    assert start(data, run, "train.epochs=2") == (0, "")
    assert (run / "best" / "model.json").is_file()
    assert not (run / "earlier-1").exists()


@pytest.mark.parametrize("name", ["best", "metrics.jsonl"])
def test_a_run_that_begins_anew_moves_links_that_lead_nowhere_aside(name: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(data, run) == (0, "")
    to_nowhere(name)(run)
    assert start(data, run, "--resume", "never") == (0, "")
    assert (run / "earlier-1" / name).is_symlink()


@pytest.mark.parametrize("inside", ["", "seed-0"])
def test_an_output_behind_a_link_that_leads_nowhere(inside: str, data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "unmounted")
    code, error = start(data, link / inside)
    assert code == 2
    assert f"--output {link} is a link that leads nowhere: mount what it leads to, or remove the link" in error
    (tmp_path / "unmounted").mkdir()
    assert start(data, link / inside) == (0, "")


def test_metrics_that_are_gone_are_said(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    assert start(data, run) == (0, "")
    assert "metrics.jsonl" not in caplog.text
    (run / "metrics.jsonl").unlink()
    assert start(data, run, "train.epochs=2") == (0, "")
    (said,) = [each.getMessage() for each in caplog.records if "metrics.jsonl" in each.getMessage()]
    assert re.search(r"metrics\.jsonl is gone: the lines before sample \d+ are lost$", said)


def test_an_output_that_is_no_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, said = start(data, tmp_path / "run", "--resume", "never")
    assert code == 2
    assert "holds what is no run (notes.txt): name a new folder" in said
    assert start(data, tmp_path / "new", "--resume", "never") == (0, "")


def test_a_run_knows_its_data_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a data set of the same sizes lies at the same relative path."""
    for seed, place in enumerate(("here", "there")):
        (tmp_path / place).mkdir()
        make_features(tmp_path / place / "data", seed=seed)
    monkeypatch.chdir(tmp_path / "here")
    assert start(Path("data"), tmp_path / "run") == (0, "")
    monkeypatch.chdir(tmp_path / "there")
    assert load_config(tmp_path / "run" / "config.yaml").data == str(tmp_path / "here" / "data")
    assert open_task(tmp_path / "run").reader.data == str(tmp_path / "here" / "data")


@pytest.mark.parametrize("words", [["train.precision=fp16"], ["optim.weight_decay=1000"]], ids=["fp16", "decay"])
def test_a_learning_rate_that_is_too_high(words: list[str], data: Path, tmp_path: Path) -> None:
    run, kept, lower = tmp_path / "run", [*words, "train.epochs=2"], "optim.generator_lr=1e-4"
    code, said = start(data, run, "optim.generator_lr=1000", *kept)
    assert (code, bool(re.search("go on with a lower optim.generator_lr", said))) == (2, True), said
    code, said = start(data, run, lower, *kept)
    assert (code, bool(re.search("is spoilt already: begin anew with it by --resume never", said))) == (2, True), said
    assert start(data, run, lower, *kept, "--resume", "never") == (0, "")
