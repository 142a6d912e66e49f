"""What is written to a folder mixes with nothing else that lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from launchers import embed, index
from shards.index import IndexCommand
from shards.pack import pack
from shards.partitions import Partitions
from shards.sources.folder import FolderCommand
from shards.split import SplitCommand, split
from tests.toy import call, jpeg, save_untrained, small_config
from tune.options import Arguments, check_resume


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_embeddings_and_indexes_keep_out_of_other_folders(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data, run, emb = feature_data(), tmp_path / "run", tmp_path / "emb"
    save_untrained(run, data, small_config(8))
    words = [str(run), "--data", str(data), "--processes=1", "--output"]
    assert call(embed.main, *words, str(emb)) == (0, "")
    assert call(index.main, str(emb), "--output", str(tmp_path / "index")) == (0, "")
    for main, given, other, kind in (
        (embed.main, words, run / "best", "a model"),
        (embed.main, words, data, "a data set"),
        (embed.main, words, tmp_path / "index", "an index"),
        (index.main, [str(emb), "--output"], emb, "embeddings"),
        (index.main, [str(emb), "--output"], run / "best", "a model"),
    ):
        before = names(other)
        code, said = call(main, *given, str(other))
        assert code == 2
        assert f"output {other} is {kind}: name another folder (" in said
        assert names(other) == before
    assert call(embed.main, *words, str(emb)) == (0, "")
    assert call(index.main, str(emb), "--output", str(tmp_path / "index")) == (0, "")


def test_a_folder_is_packed_neither_into_itself_nor_into_another_kind(tmp_path: Path) -> None:
    raw, emb = tmp_path / "raw", tmp_path / "emb"
    raw.mkdir()
    (raw / "a.jpg").write_bytes(jpeg(np.random.default_rng(0)))
    (raw / "a.txt").write_text("a dog")
    with pytest.raises(BadInput, match="raw is the input folder itself: name another folder"):
        FolderCommand(input=raw, output=str(raw / ".." / "raw")).pairs(Partitions(raw))
    emb.mkdir()
    (emb / "embeddings.json").write_text("{}")
    command = FolderCommand(input=raw, output=str(emb), processes=1)
    with pytest.raises(BadInput, match=r"emb is embeddings: name another folder \(embeddings.json lies in it\)"):
        pack(command)


def test_what_draws_splits_indexes_and_searches_keeps_out_too(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, run, remote = feature_data(), tmp_path / "run", FileStore("memory://run", "--output")
    save_untrained(run, data, small_config(8))
    remote.write("model.json", "{}")
    before = names(run)
    with pytest.raises(BadInput, match=r"--output .*best is a model: name another folder"):
        split(SplitCommand(str(data), output=str(run / "best"), val=0.1, test=0.0))
    with pytest.raises(BadInput, match=r"folder .*best is a model: name another folder"):
        IndexCommand(str(run / "best"), overwrite=True).index()
    for output in (FileStore(str(run / "best"), "--output"), remote):
        with pytest.raises(
            BadInput, match=r"--output .* is a model: name another (folder|place) \(model\.json lies in it"
        ):
            check_resume(output, {}, Arguments())
        with pytest.raises(BadInput, match=r"--output .* is a model"):
            output.check_output("embeddings.json")
    assert names(run) == before
