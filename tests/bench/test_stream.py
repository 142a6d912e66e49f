"""The comparison of streams says what it cannot use before it builds or times anything."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.stream_data import BATCH, build
from cmgan_dist.errors import BadInput
from tests.toy import index_tar, write_manifest, write_tar


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "PNG")
    return out.getvalue()


def test_pictures_that_are_no_jpegs_are_refused(tmp_path: Path) -> None:
    data, record = tmp_path / "png", b'{"texts": ["a red square"]}'
    data.mkdir()
    parts = [[(f"s{i}.png", png()), (f"s{i}.json", record)] for i in range(2 * BATCH)]
    write_tar(data / "train-000000.tar", [member for part in parts for member in part])
    write_manifest(data, {"train": [index_tar(data / "train-000000.tar")]}, label_kind="none", classes=[])
    with pytest.raises(BadInput, match=r"--data .*png: the picture of sample 's0' is no JPEG: name data of JPEGs"):
        build(data, 2 * BATCH, tmp_path / "work", None)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        ("stream", ["--data", "nowhere", "--peers", "/nowhere/python"], "--peers /nowhere/python cannot be started"),
        ("stream", ["--data", "nowhere", "--peers", "/"], "--peers / cannot be started"),
        ("stream", ["--data", "nowhere", "--peers", "true"], "--peers true is no Python that works"),
        ("wait", ["nowhere", "--chromium", "/nowhere/chromium"], "--chromium /nowhere/chromium is no program"),
    ],
)
def test_a_program_that_cannot_be_run_is_named_with_its_flag(
    monkeypatch: pytest.MonkeyPatch, script: str, words: list[str], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(BadInput) as refused:
        importlib.import_module(f"bench.{script}").main()
    assert str(refused.value).startswith(sentence)
