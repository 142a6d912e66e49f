"""Ten ways to be wrong, each by the command that a user would have run: exit code 2 and one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.errors import EXIT_LOST
from tests.services import forked
from tests.toy import SMALL, environment, index_tar, write_manifest, write_tar

pytestmark = pytest.mark.process

Case = Callable[[Callable[..., Path], Callable[..., Path], Path], list[str]]


def run(args: list[str]) -> subprocess.CompletedProcess[str]:
    return forked.run(args, environment(), timeout=120)


def train(data: Path | str, run_folder: Path, *extra: str) -> list[str]:
    return ["launchers/train.py", *SMALL, "--data", str(data), "--output", str(run_folder), *extra]


RAW = ["model.text.name=cnn", "model.image.name=resnet18", "model.image.image_size=32", "train.epochs=40"]


def missing_folder(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    return train(tmp / "nowhere", tmp / "run")


def empty_shard(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    data = feature_data()
    write_tar(data / "train-000003.tar", [])
    info = index_tar(data / "train-000003.tar")
    manifest = (data / "manifest.json").read_text().replace('"train": [', '"train": [' + _line(info) + ",", 1)
    (data / "manifest.json").write_text(manifest)
    return train(data, tmp / "run")


def _line(info: object) -> str:
    import dataclasses
    import json

    return json.dumps(dataclasses.asdict(info))  # type: ignore[call-overload]


def truncated_tar(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    data = feature_data(splits={"train": [60, 60], "val": [24]})
    path = data / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])
    return train(data, tmp / "run", "train.epochs=40")


def corrupt_image(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    return train(raw_data(spoil={3: "image", 9: "image"}), tmp / "run", *RAW, "stream.workers=2")


def missing_text(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    return train(raw_data(spoil={3: "text", 9: "text"}), tmp / "run", *RAW)


def label_out_of_range(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    return train(raw_data(spoil={3: "label", 9: "label"}), tmp / "run", *RAW)


def split_without_samples(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    data = feature_data(splits={"train": [40]})
    write_manifest(data, {"train": [index_tar(data / "train-000000.tar")], "val": []}, image="features", image_dim=12)
    return train(data, tmp / "run")


def unknown_flag(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    return train(tmp, tmp / "run", "--optim.generator-rate", "1")


def unknown_preset(feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path) -> list[str]:
    return ["launchers/train.py", "--preset", "refrence", "--data", str(tmp), "--output", str(tmp / "run")]


def changed_file_of_the_best_model(
    feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp: Path
) -> list[str]:
    data = feature_data()
    done = run(train(data, tmp / "run"))
    assert done.returncode == 0, done.stderr
    config = tmp / "run" / "best" / "config.yaml"
    config.write_text(config.read_text().replace("common_dim: 64", "common_dim: 32"))
    return ["launchers/evaluate.py", str(tmp / "run")]


CASES: list[tuple[Case, str]] = [
    (missing_folder, "data folder * does not exist: pack one with 'python -m shards build'"),
    (empty_shard, "shard *train-000003.tar is empty"),
    (truncated_tar, "train-000001.tar sample * the shard is truncated at byte"),
    (
        corrupt_image,
        "samples read from * are unusable, more than stream.max_bad_share * sample train*the image does not decode",
    ),
    (missing_text, "samples read from * has no text"),
    (label_out_of_range, "samples read from * is out of range, there are 3 classes"),
    (split_without_samples, "split 'val' of toy has no samples"),
    (unknown_flag, "Unrecognized options: --optim.generator-rate"),
    (unknown_preset, "unknown preset 'refrence': did you mean 'reference'?"),
    (changed_file_of_the_best_model, "best/config.yaml is damaged: its checksum is not in model.json"),
]


@pytest.mark.parametrize(("case", "sentence"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_bad_input_gets_one_sentence(
    case: Case, sentence: str, feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    from fnmatch import fnmatch

    done = run(case(feature_data, raw_data, tmp_path))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    print(errors[0])  # pytest -rP shows the sentences
    assert fnmatch(errors[0].replace("?", "!"), f"*{sentence}*".replace("?", "!")), errors[0]


@pytest.mark.parametrize(
    ("kib", "work"),
    [
        (700_000, "import torch"),
        (0, "import torch; torch.empty(1 << 46)"),
        (0, "import numpy; numpy.empty(1 << 46)"),
        (0, "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore')"),
        (0, "raise MemoryError"),
    ],
)
def test_memory_that_is_used_up_is_one_sentence(kib: int, work: str, tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(f"from cmgan_dist.errors import run_main\ndef main():\n    {work}\nrun_main(main)\n")
    limit = f"ulimit -v {kib}; " if kib else ""
    done = subprocess.run(
        ["bash", "-c", f'{limit}exec "$0" "$1"', sys.executable, str(script)],
        capture_output=True, text=True, env=environment(), timeout=100,
    )  # fmt: skip
    assert done.returncode == EXIT_LOST
    assert re.fullmatch(r"error: memory is used up \(.+\): allow more, .+\n", done.stderr), done.stderr
