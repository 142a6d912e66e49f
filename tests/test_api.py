"""What ``import cmgan_dist`` offers, and that it costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cmgan_dist
from tests.toy import environment


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in cmgan_dist.__all__:
        value = getattr(cmgan_dist, name)
        assert name in dir(cmgan_dist)
        assert value.__doc__


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        cmgan_dist.lod  # noqa: B018


@pytest.mark.process
def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, cmgan_dist; print(sorted({'torch', 'numpy', 'yaml', 'tyro', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_config_is_trained_evaluated_and_used(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    config = cmgan_dist.preset("smoke")
    config.data, config.output = str(feature_data()), str(tmp_path / "run")
    config.stream.global_batch, config.train.epochs, config.train.tracker = 16, 2, "none"
    config.train.threads = 1
    assert cmgan_dist.train(config) == 0
    metrics = cmgan_dist.evaluate(config.output)
    model = cmgan_dist.load(config.output)
    assert 0 < metrics["map/mean"] <= 1
    assert model.saved.scoring.spec.asked
    assert not (tmp_path / "run" / "report.html").exists()


def test_training_without_a_place_or_with_a_mistyped_resume_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    config = cmgan_dist.preset("smoke")
    with pytest.raises(cmgan_dist.BadInput, match="--data is missing"):
        cmgan_dist.train(config, resume="never")
    config.data = "somewhere"
    with pytest.raises(cmgan_dist.BadInput, match="--output is missing"):
        cmgan_dist.train(config, resume="never")
    config.output = str(tmp_path)
    with pytest.raises(cmgan_dist.BadInput, match="resume is 'atuo', expected auto or never"):
        cmgan_dist.train(config, resume="atuo")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
