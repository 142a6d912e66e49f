"""What tests of embedding share: a run and data that it fits, and what lies in a folder of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmgan_dist.config.fields import Config
from cmgan_dist.retrieval.embed_job import embed
from cmgan_dist.retrieval.embed_options import EmbedOptions
from cmgan_dist.retrieval.embeddings import EmbeddingSet
from tests.toy import make_raw, save_untrained, small_config


def raw_config() -> Config:
    """A config of small networks on small pictures and texts."""
    config = small_config(8, eval__batch=7)
    config.model.image.name, config.model.image.image_size = "test_efficientnet", 32
    config.model.text.name, config.model.text.channels = "cnn", 4
    return config


def raw_run(folder: Path, name: str = "run", **options: Any) -> tuple[Path, Path]:
    """A run `name` on raw data, and the data, in `folder`."""
    data = make_raw(folder / "raw", **options)
    save_untrained(folder / name, data, raw_config())
    return folder / name, data


def embedded(run: Path, output: Path | str, **options: Any) -> EmbeddingSet | None:
    """What `embed` returns in this process; data and the like as paths."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return embed(EmbedOptions(str(run), str(output), **{"processes": 1, **given}))


def whole(run: Path, output: Path | str, **options: Any) -> EmbeddingSet:
    """`embedded` where no other task has anything to do."""
    made = embedded(run, output, **options)
    assert made is not None
    return made


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
