"""What a search is told: numbers out of range and a damaged search.json are said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from tune.options import RANGES, Arguments, base_config, check_numbers, check_resume

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


def test_a_search_goes_on_with_what_it_was_begun_with(tmp_path: Path) -> None:
    output = FileStore(str(tmp_path), "--output")
    assert not check_resume(output, IDENTITY, Arguments(resume=True))
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
