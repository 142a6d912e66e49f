"""Golden curves: the losses of the first 50 batches of every preset on toy data.

    python -m tests.golden.record [PRESET ...]   write tests/golden/PRESET.json anew (say why in the commit message)

A change that should only make things faster must leave them where they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from cmgan_dist.config.fields import Config
from cmgan_dist.config.presets import PRESETS, preset
from cmgan_dist.errors import run_main
from cmgan_dist.training.loop import train
from cmgan_dist.training.recorder import read_metrics
from tests.toy import make_features, make_raw

GOLDEN = Path(__file__).resolve().parent
STEPS = 50


def golden_config(name: str, folder: Path) -> Config:
    """The preset on toy data of its kind; raw pictures small, so that it takes seconds."""
    config = preset(name)
    if name == "raw":
        config.stream.global_batch, config.model.image.image_size = 16, 64
        config.data = str(make_raw(folder / "data"))
    else:
        kind = "none" if name == "pairs" else "single"
        splits = {"train": [300, 212], "val": [40]}
        config.data = str(make_features(folder / "data", splits=splits, dims=(48, 24), captions=2, label_kind=kind))
        config.stream.global_batch = min(config.stream.global_batch, 128)
    config.output = str(folder / "run")
    samples = 40 if name == "raw" else 512
    config.train.epochs = STEPS / (samples // config.stream.global_batch)
    config.train.log_every, config.train.val_every, config.train.tracker, config.train.threads = 1, 0, "none", 1
    return config


def curve(name: str) -> dict[str, list[float]]:
    """Loss term -> its values at 50 batches, 0 where a lazy penalty was left out."""
    with tempfile.TemporaryDirectory() as folder:
        config = golden_config(name, Path(folder))
        train(config)
        lines = [line for line in read_metrics(Path(config.output)) if line["kind"] == "train"]
    assert len(lines) == STEPS
    return {k: [round(line.get(k, 0.0), 6) for line in lines] for k in lines[0] if k.startswith("loss/")}


def main() -> None:
    """Write the curves of the presets that the command line names, or of all."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    for name in sys.argv[1:] or PRESETS:
        (GOLDEN / f"{name}.json").write_text(json.dumps(curve(name)) + "\n")
        print(f"{name}: recorded with torch {torch.__version__}")


if __name__ == "__main__":
    run_main(main)
