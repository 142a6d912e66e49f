"""What a search is told: numbers out of range and a damaged search.json are said in one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.config.load import to_yaml
from cmgan_dist.config.presets import preset
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from tests.toy import make_features
from tests.tune.search_cases import arguments
from tune.options import RANGES, Arguments, base_config, check_numbers, check_resume
from tune.search import make_plan

IDENTITY: dict[str, Any] = {"preset": "smoke", "trials": 2}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("cpus", "nan"),
        ("cpus", "inf"),
        ("cpus", "1e-320"),
        ("cpus", "0"),
        ("gpus", "nan"),
        ("gpus", "-1"),
        ("gpus", "0.00001"),
        ("gpus", "1.5"),
        ("time_budget_s", "nan"),
        ("epochs", "nan"),
        ("seed", "-1"),
        ("seed", "4294967296"),
        ("concurrent", "-1"),
        ("confirm", "-1"),
        ("nodes", "0"),
    ],
)
def test_a_number_out_of_range_is_named(flag: str, value: str) -> None:
    fields: dict[str, Any] = {"preset": "smoke", "data": "data", "output": "output"}
    fields[flag] = float(value) if isinstance(getattr(Arguments(), flag), float) else int(value)
    with pytest.raises(BadInput, match=rf"--{flag.replace('_', '-')} is .*, expected .* to "):
        base_config(Arguments(**fields))


def test_every_number_has_a_range_that_its_default_fits() -> None:
    defaults = vars(Arguments())
    numbers = {k for k, v in defaults.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert set(RANGES) == numbers
    check_numbers(Arguments())


@pytest.mark.parametrize("text", ['{"preset": "smo', "[1]", '{"foo": 1}', "{}", "", "[" * 100_000, b"\xff"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_search_is_named(text: str | bytes, resume: bool, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=r"search\.json is damaged .*: name another --output"):
        check_resume(FileStore(str(tmp_path), "--output"), IDENTITY, Arguments(resume=resume))


def test_a_search_goes_on_with_what_it_was_begun_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = FileStore(str(tmp_path), "--output")
    assert not check_resume(output, IDENTITY, Arguments())
    assert not caplog.messages
    assert not check_resume(output, IDENTITY, Arguments(resume=True))
    assert caplog.messages == [f"--resume: --output {tmp_path} holds no search to go on with, so a new one begins"]
    output.write("search.json", json.dumps(IDENTITY))
    assert check_resume(output, IDENTITY, Arguments(resume=True))
    output.write("records/search/000001.json", "{}")
    (tmp_path / "search.json").rename(tmp_path / "kept.json")
    for resume in (True, False):
        with pytest.raises(BadInput, match=r"000001\.json is of a search whose search\.json is gone: restore it, or"):
            check_resume(output, IDENTITY, Arguments(resume=resume))
    (tmp_path / "kept.json").rename(tmp_path / "search.json")
    assert check_resume(output, IDENTITY, Arguments(resume=True))
    with pytest.raises(BadInput, match="add --resume"):
        check_resume(output, IDENTITY, Arguments())
    with pytest.raises(BadInput, match="has trials 2, not 3: use that value"):
        check_resume(output, IDENTITY | {"trials": 3}, Arguments(resume=True))


def begin(tmp_path: Path, data: Path) -> Arguments:
    """Return how a search from a config file goes on that has written its search.json."""
    (tmp_path / "base.yaml").write_text(to_yaml(preset("smoke")))
    given = arguments(tmp_path, data, "", preset="", config=str(tmp_path / "base.yaml"))
    plan = make_plan(given)
    plan.output.write("search.json", json.dumps(plan.identity))
    again = dataclasses.replace(given, resume=True)
    assert make_plan(again).resumed
    return again


def test_an_edited_base_config_is_named(tmp_path: Path) -> None:
    again = begin(tmp_path, make_features(tmp_path / "data"))
    config = preset("smoke")
    config.model.common_dim, config.stream.workers = 24, 1
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    with pytest.raises(BadInput, match=r"has model\.common_dim \d+, not 24: use that value, or another --output"):
        make_plan(again)
    config.model.common_dim = preset("smoke").model.common_dim
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    assert make_plan(again).resumed, "how a machine reads data is no part of a search"


def test_other_data_under_the_same_path_is_named(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    again = begin(tmp_path, data)
    manifest = (data / "manifest.json").read_text()
    first = json.loads(manifest)["classes"][0]
    (data / "manifest.json").write_text(manifest.replace(f'"{first}"', '"renamed"'))
    with pytest.raises(BadInput, match=r"has other data \(class 0 is .*, not 'renamed'\): use the same data, or"):
        make_plan(again)
    shutil.rmtree(data)
    make_features(data, seed=1)
    with pytest.raises(BadInput, match=r"has other data \(shards with other checksums\): use the same data, or"):
        make_plan(again)


def test_a_damaged_fingerprint_is_one_sentence(tmp_path: Path) -> None:
    again = begin(tmp_path, make_features(tmp_path / "data"))
    file = tmp_path / "search" / "search.json"
    for damaged in (7, {"classes": 7}, {"foo": 1}, {"classes": [1]}):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": damaged}))
        with pytest.raises(BadInput, match=r"has other data \(.*\): use the same data, or another --output"):
            make_plan(again)
