"""Texts that a text backbone is not made for are told of when features are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.config.fields import TextBackboneConfig
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.store import LocalStore
from cmgan_dist.models.backbone import TextBackbone
from cmgan_dist.models.backbones import build_text_backbone
from cmgan_dist.models.clip import ClipTextBackbone
from shards.unfit import some_texts, unfit, unfit_for, warnings_of
from tests.models.clip_cases import stored_clip
from tests.models.text_cases import stored_sentence_encoder
from tests.toy import run_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_sentence_encoder(tmp_path_factory.mktemp("unfit") / "sentence")


def encoder(folder: Path, most: int) -> TextBackbone:
    return build_text_backbone(TextBackboneConfig("sentence", str(folder), max_tokens=most))


def test_shares_of_unknown_and_of_cut_tokens(folder: Path) -> None:
    tokeniser = encoder(folder, 32).model.tokenizer
    ids = tokeniser(["red dog", "花 dog", "red red red red red red"], add_special_tokens=False)["input_ids"]
    found = unfit(ids, tokeniser.unk_token_id, 4)
    assert (found.unknown, found.cut, found.cut_texts) == (1 / 10, 2 / 10, 1 / 3)
    assert unfit([[], [5]], None, 4).cut == 0


def test_tokens_of_open_clip_are_counted_as_its_tower_gets_them(tmp_path: Path) -> None:
    where, _ = stored_clip(tmp_path / "clip")
    for most, cut in ((5, 1), (6, 0)):
        tower = build_text_backbone(TextBackboneConfig("open_clip:stored", str(where), max_tokens=most))
        assert isinstance(tower, ClipTextBackbone)
        (length,) = tower.lengths(["Red DOG, boat"])  # four tokens and two marks
        told = unfit_for(tower, ["Red DOG, boat"])
        assert told is not None
        assert (length, told[1], told[0].cut * 4, told[0].cut_texts, told[0].unknown) == (most, most, cut, cut, 0)


def test_features_of_open_clip_take_as_many_tokens_as_the_model_and_say_what_they_cut(
    tmp_path: Path, raw_data: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (where, _), data = stored_clip(tmp_path / "clip"), raw_data(counts={"train": 3})
    words = ["--text-backbone", "open_clip:stored", "--text-weights", where, "--processes", 1]
    run_shards("features", data, "--output", tmp_path / "all", *words)
    assert "texts are cut at 77 tokens, which open_clip:stored takes" in (said := capsys.readouterr().out)
    assert "warning: " not in said
    run_shards("features", data, "--output", tmp_path / "few", *words, "--max-tokens", 5)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "are longer than the 5 tokens" in line
    assert line.endswith("raise --max-tokens, the model takes 77, or give shorter texts")
    details = [load_manifest(tmp_path / name).details["text"]["max_tokens"] for name in ("all", "few")]
    assert details == [77, 5]


def test_what_is_unfit_is_printed_before_the_work(
    folder: Path, raw_data: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = raw_data()  # texts of four words that the encoder knows
    shards = [shard for shards in load_manifest(data).splits.values() for shard in shards]
    assert len(some_texts(LocalStore(data), shards)) == sum(1 + i % 3 for count in (40, 16, 16) for i in range(count))
    assert warnings_of(encoder(folder, 8), LocalStore(data), shards) == []
    assert warnings_of(None, LocalStore(data), shards) == []
    words = ["--text-backbone", "sentence", "--text-weights", folder, "--max-tokens", 5, "--processes", 1]
    run_shards("features", data, "--output", tmp_path / "out", *words)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "100.0% of 141 texts are longer than the 5 tokens" in line
    assert "25.0% of their tokens are cut off: raise --max-tokens" in line
    run_shards("features", data, "--output", tmp_path / "out", *words)
    assert "warning: " not in (said := capsys.readouterr().out)  # nothing is made of the texts
    assert said.startswith("already written: ")


def test_texts_of_another_script_are_told_of(folder: Path, raw_data: Callable[..., Path]) -> None:
    data = raw_data()
    text = folder / "tokenizer.json"
    text.write_text(text.read_text().replace('"dog": 10', '"cat": 10'))
    shards = [shard for shards in load_manifest(data).splits.values() for shard in shards]
    (line,) = warnings_of(encoder(folder, 32), LocalStore(data), shards)
    assert "of the tokens of 141 texts are unknown to the text backbone" in line
