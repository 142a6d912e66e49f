"""What each term brings: a preset and its ablations over seeds, beside CCA, ridge and chance on the same features.

    python -m bench.ablation --preset openmoji --data data/openmoji-features [--seeds 5] [--jobs 2]

Each run is `launchers/train.py` and `launchers/evaluate.py` as a user calls them: validation picks the checkpoint, the
test split is read once by the finished run. A term that is added is tried with each of WEIGHTS on seed 0; validation
chooses one for all seeds. Finished runs in --work are not done again. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.common import write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import BadInput, run_main

ROOT = Path(__file__).resolve().parents[1]
NO_CONTRAST = ["loss.contrastive=0", "loss.class_contrastive=0"]
WEIGHTS = ("0.1", "0.5", "2.0")
"""What stands for WEIGHT in a variant; validation of seed 0 chooses."""
INTER, INTRA = ["loss.inter=WEIGHT", "loss.mismatch=conditional"], ["loss.intra=WEIGHT"]
MODALITY = ["loss.modality=WEIGHT", "loss.r1=1"]
GAN = [*INTER, *INTRA, *MODALITY]
APART = ["model.share_classifier=false", "loss.classification=1.0", *NO_CONTRAST, "eval.score=cosine"]
PAIR_VARIANTS: dict[str, list[str]] = {
    "preset": [],
    "with inter-modality GAN": INTER,
    "with intra-modality GAN": INTRA,
    "with modality GAN": MODALITY,
    "with all GANs": GAN,
    "layers not shared": ["model.share_layers=false"],
    "no pair head": ["eval.pair_head=false"],
    "no query bank": ["eval.bank=0"],
}
"""Name -> overrides of the preset that make sense without labels."""
VARIANTS: dict[str, list[str]] = {
    **PAIR_VARIANTS,
    "no contrastive": ["loss.contrastive=0"],
    "no class contrastive": ["loss.class_contrastive=0"],
    "class loss only": NO_CONTRAST,
    "two classifiers": APART,
    "two classifiers, inter-modality GAN": [*APART, *INTER],
    "two classifiers, intra-modality GAN": [*APART, *INTRA],
    "two classifiers, modality GAN": [*APART, *MODALITY],
    "two classifiers, modality GAN without R1": [*APART, "loss.modality=WEIGHT"],
    "two classifiers, all GANs": [*APART, *GAN],
    "two classifiers, contrastive": [*APART, "loss.contrastive=WEIGHT"],
}
"""Name -> overrides of the preset. With a classifier of its own per modality, as in the reference, the class loss does
not bring the modalities together: that is where the adversarial terms work, and the cosine shows it."""


@dataclass
class Arguments:
    """Train a preset and its ablations over seeds and print mean and spread of each measure."""

    data: Path
    """Folder of shards."""
    preset: str = "openmoji"
    """Preset to ablate."""
    seeds: Count = 5
    """Runs per variant."""
    jobs: Annotated[int, Range(1, 4096)] = 2
    """Runs at a time, one thread each."""
    work: Path = Path("runs/ablation")
    """Where runs are kept."""
    variants: tuple[str, ...] = ()
    """Some of the variants; all when left out."""
    name: str = ""
    """Name of the results file; ablation-PRESET when left out."""


def run(variant: str, weight: str, seed: int, arguments: Arguments) -> dict[str, Any]:
    """Train and evaluate once; returns evaluation.json with the best validation score."""
    name = "-".join([*variant.replace(",", "").split(), *[weight] * bool(weight)])
    folder = arguments.work / arguments.preset / name / f"seed{seed}"
    done = folder / "evaluation.json"
    if not done.is_file():
        common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        train = [sys.executable, str(ROOT / "launchers" / "train.py"), "--preset", arguments.preset]
        train += ["--data", str(arguments.data), "--output", str(folder), f"train.seed={seed}", "train.threads=1"]
        train += ["train.tracker=none", "train.report=false"]
        train += [override.replace("WEIGHT", weight) for override in VARIANTS[variant]]
        evaluate = [sys.executable, str(ROOT / "launchers" / "evaluate.py"), str(folder), "--json"]
        evaluate += [] if seed == 0 and variant == "preset" else ["--no-baselines"]
        for command in (train, evaluate):
            finished = subprocess.run(command, env=common, capture_output=True, text=True, check=False)
            if finished.returncode:
                raise BadInput(f"{variant}, seed {seed} failed: {finished.stderr.strip().splitlines()[-1]}")
    record: dict[str, Any] = json.loads(done.read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record["validation"] = max(line["score"] for line in lines if line["kind"] == "val")
    record["weight"] = weight
    return record


def weights_of(variant: str) -> tuple[str, ...]:
    """Return the weights that are tried for a variant; one, "", where it has none."""
    return WEIGHTS if any("WEIGHT" in override for override in VARIANTS[variant]) else ("",)


def all_runs(variants: list[str], arguments: Arguments) -> dict[str, list[dict[str, Any]]]:
    """Do all runs, seed 0 with each weight first; return variant -> the records of its seeds."""

    def done(tasks: list[tuple[str, str, int]], what: str) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(run, *task, arguments) for task in tasks]
            return [future.result() for future in track(futures, what, console=Console(stderr=True))]

    tasks = [(variant, weight, 0) for variant in variants for weight in weights_of(variant)]
    found: dict[str, list[dict[str, Any]]] = {}
    for (variant, _, _), record in zip(tasks, done(tasks, "tries"), strict=True):
        best = found.setdefault(variant, [record])
        if record["validation"] > best[0]["validation"]:
            best[0] = record
    tasks = [(variant, found[variant][0]["weight"], seed) for variant in variants for seed in range(1, arguments.seeds)]
    for (variant, _, _), record in zip(tasks, done(tasks, "seeds"), strict=True):
        found[variant].append(record)
    return found


def end_of(record: dict[str, Any], measure: str) -> dict[str, Any]:
    """Return the metrics of the end that a measure belongs to: MAP to the class end, recall to the pair end."""
    ends: dict[str, dict[str, Any]] = record["ends"]
    return ends.get("class" if measure.startswith("map") else "pair", record["metrics"])


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.ablation")
    labelled = bool(json.loads((arguments.data / "manifest.json").read_text())["classes"])
    chosen = list(arguments.variants or (VARIANTS if labelled else PAIR_VARIANTS))
    for variant in chosen:
        if variant not in VARIANTS:
            raise BadInput(f"--variants names '{variant}': choose from {', '.join(VARIANTS)}")
    found = all_runs(chosen, arguments)
    measures = ["map/image_to_text", "map/text_to_image", "map/mean"] if labelled else []
    measures += [f"recall/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    rows: dict[str, dict[str, Any]] = {}
    for variant, runs in found.items():
        rows[variant] = {"validation": spread([r["validation"] for r in runs])}
        rows[variant] |= {"weight": runs[0]["weight"]} if runs[0]["weight"] else {}
        rows[variant] |= {m: spread([end_of(r, m)[m] for r in runs]) for m in measures}
    baselines: dict[str, Any] = next((r["baselines"] for runs in found.values() for r in runs if r["baselines"]), {})
    for name, values in baselines.items():
        rows[name] = {m: {"mean": values[m], "std": 0.0} for m in measures}

    short = {m: m.replace("image_to_text", "I→T").replace("text_to_image", "T→I") for m in ["validation", *measures]}
    table = Table(title=f"{arguments.preset}: test split, {arguments.seeds} seeds", title_justify="left")
    table.add_column("")
    for measure in short.values():
        table.add_column(measure.replace("/", "\n"), justify="right")
    for name, row in rows.items():
        cells = [row.get(m) for m in short]
        table.add_row(
            f"{name} x{row['weight']}" if "weight" in row else name,
            *(f"{c['mean']:.3f}\n±{c['std']:.3f}" if c else "–" for c in cells),
        )
    Console(width=140).print(table)
    record = {"preset": arguments.preset, "seeds": arguments.seeds, "rows": rows}
    print(f"written to {write_results(arguments.name or f'ablation-{arguments.preset}', record)}")


if __name__ == "__main__":
    run_main(main)
