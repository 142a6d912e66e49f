"""Samples per second of one core: this stream beside what else feeds pictures to PyTorch; resume; raw reads.

    python -m bench.stream --data data/flickr8k [--peers /path/to/python] [--images 2000] [--rounds 5]

One process each, one thread, no workers, the same JPEG bytes, bicubic, uint8 [64, 3, 224, 224] out: ours as a view of
pixels of four bytes, which is how it hands them to the device. In every round the contestants take turns; a figure is
the median over the rounds. On a machine that others use too the processor time is the figure to trust. The 512-px files
are made here: `512` is each picture enlarged, `512 detail` cut from nine side by side, so that it has the detail of a
photograph reduced to 512 px. Contestants:

    ours                 cmgan_dist.data.stream.Stream: always shuffled, texts parsed
    webdataset + PIL     decode("pil"); + torchvision: torchvision.io.decode_jpeg; + OpenCV
    mosaicml + ...       StreamingDataset and StreamingDataLoader on MDS; the bytes decoded in the first two ways
    ImageFolder + ...    DataLoader; the PIL loader, torchvision.io.decode_image, or bytes for OpenCV or kornia_rs
    DALI                 its pipeline on CPU

OpenCV and kornia_rs enlarge bicubic and reduce bilinear without antialiasing, which is their fastest (`OpenCV area`:
INTER_AREA); pixels too far off for the comparison are said with the figure, which then counts for nothing.
`eval` takes the centre (and only ours is shuffled), `train` a random resized crop and a flip (all are shuffled).
`features` are shards of .npy arrays of the shape that `python -m shards features` writes of Flickr8k, [1280] and
[5, 384], one of the five drawn, in batches of 1024; webdataset decodes them itself and is not shuffled.
`--peers` names the Python of an environment that has, beside this project, mosaicml-streaming (--no-deps: it pins an
old numpy), nvidia-dali-cuda130 and kornia_rs; a peer that it does not have is named in the table.
Writes bench/results/stream.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.common import Worker, spread, write_results
from bench.stream_data import BATCH, FEATURE_BATCH, FEATURE_SHARDS, build, build_features, count, place_of
from bench.stream_decoders import SIZE
from bench.stream_peers import CONTESTANTS, FEATURE_CONTESTANTS, NEEDS, RESUME_AT, RESUMING
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import BadInput, run_main

ROOT = Path(__file__).resolve().parents[1]
PIXELS = 64
"""Pictures that are compared before anything is timed."""
TOLERANCE = {"224": 1.0, "512": 2.0, "512 detail": 4.0}
"""Mean absolute difference in grey levels from Pillow's decoding and bicubic resize, by source."""
SETTINGS = (("224", "eval"), ("224", "train"), ("512", "eval"), ("512", "train"), ("512 detail", "eval"))


@dataclass
class Arguments:
    """Time the stream against its peers and write bench/results/stream.json."""

    data: Path
    """Folder of shards with encoded images: Flickr8k by `python -m shards build flickr8k`."""
    images: Annotated[int, Range(2 * BATCH, 1e9)] = 2000
    """Samples of the train split that are used."""
    rounds: Count = 5
    """Rounds; in each all contestants take turns."""
    work: Path = Path("runs/bench-stream")
    """Where the data of all contestants is built."""
    peers: str = sys.executable
    """Python that has the peers that are no dependencies of this project; those it lacks are named in the table."""
    name: str = "stream"
    """Of the results file in bench/results/."""


def command(python: str, *words: object) -> list[str]:
    return [python, "-m", "bench.stream", "worker", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def answer_of(output: str) -> Any:
    lines = [line for line in output.splitlines() if line.startswith("answer ")]
    if not lines:
        raise BadInput("a worker ended without an answer: its traceback is above")
    return json.loads(lines[-1].removeprefix("answer "))


def run_worker(python: str, *words: object) -> Any:
    done = subprocess.run(command(python, *words), env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    return answer_of(done.stdout)


def need_of(name: str) -> tuple[str, str] | None:
    """Return the (package, module) that a contestant needs beside this project's own dependencies."""
    return next((need for start, need in NEEDS.items() if name.startswith(start)), None)


def check_python(python: str) -> None:
    """Raises BadInput where --peers names something else than a Python."""
    advice = "name the Python of an environment that has the peers, or leave --peers out"
    try:
        done = subprocess.run([python, "-c", "print(6 * 7)"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BadInput(f"--peers {python} cannot be started ({error.strerror}): {advice}") from None
    if done.stdout.strip() != "42":
        raise BadInput(f"--peers {python} is no Python that works: {advice}")


def find_absent(python: str) -> dict[str, str]:
    """Return why a contestant cannot take part, by name."""
    absent: dict[str, str] = {}
    for start, (package, module) in NEEDS.items():
        probe = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if probe.returncode:
            said = (probe.stderr.strip().splitlines() or ["it died"])[-1]
            reason = f"{python} cannot import {module} ({said}): install {package} there"
            absent |= {name: reason for name in CONTESTANTS if name.startswith(start)}
    return absent


def reference(path: Path) -> np.ndarray:
    """What all should give: Pillow decodes, cuts and resizes, without a short cut."""
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def differences(place: Path, workers: dict[str, Worker]) -> dict[str, float]:
    """Mean absolute difference from the reference in grey levels, per contestant."""
    with suppress(FileNotFoundError):
        os.remove(place / "pixels.npz")
    files = sorted((place / "folder" / "all").iterdir())[: count(place) // BATCH * BATCH]
    chosen = files[:: max(1, len(files) // PIXELS)][:PIXELS]
    wanted = {p.stem: reference(p).astype(int) for p in chosen}
    found = {}
    for name, worker in workers.items():
        worker.ask(json.dumps({"keys": list(wanted), "path": str(place / "pixels.npz")}))
        with np.load(place / "pixels.npz") as pixels:  # an epoch leaves out a few: ours others each time
            shared = [k for k in wanted if k in pixels.files]
            if len(shared) < len(wanted) // 2:
                raise BadInput(f"{name} gave {len(shared)} of {len(wanted)} pictures: is {place} whole?")
            found[name] = float(np.mean([np.abs(pixels[k] - wanted[k]).mean() for k in shared]))
    return found


def equal_features(place: Path, workers: dict[str, Worker]) -> None:
    """Raises BadInput when the contestants do not give the same numbers."""
    wanted = [f"{shard}-{i:04d}" for shard in range(FEATURE_SHARDS) for i in range(0, FEATURE_BATCH, 100)]
    found = {}
    for name, worker in workers.items():
        worker.ask(json.dumps({"keys": wanted, "path": str(place / "pixels.npz")}))
        with np.load(place / "pixels.npz") as features:
            found[name] = {k: features[k] for k in wanted}
    for name, features in found.items():
        for key in wanted:
            if not np.array_equal(features[key], found["ours"][key]):
                raise BadInput(f"{name}'s features of {key} are not ours: not comparable")


def measure(arguments: Arguments, names: list[str], source: str, mode: str) -> dict[str, Any]:
    """Time one setting, after its pixels have been compared."""
    place = place_of(arguments.work, source)
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            python = arguments.peers if need_of(name) else sys.executable
            workers[name] = Worker(command(python, "serve", name, place, mode), env=environment())
            workers[name].answer()  # one after the other: two of mosaicml's take the same shared memory
        apart = differences(place, workers) if mode == "eval" else {}
        if mode == "features":
            equal_features(place, workers)
        if apart and apart["ours"] > TOLERANCE[source]:
            raise BadInput(f"our pixels of {source} are {apart['ours']:.2f} grey levels off: not comparable")
        times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for i in track(range(arguments.rounds), f"{source} {mode}", console=Console(stderr=True)):
            for name in names if i % 2 == 0 else reversed(names):
                times[name].append(workers[name].ask("{}"))
    finally:
        for worker in workers.values():
            worker.close()
    return compared(times, apart, TOLERANCE.get(source, 0.0))


def compared(times: dict[str, list[dict[str, float]]], apart: dict[str, float], tolerance: float) -> dict[str, Any]:
    """Return samples per second by contestant, with their difference in pixels, and ours over the fastest rival that is
    within the tolerance."""
    record: dict[str, Any] = {}
    for name, found in times.items():
        record[name] = {clock: spread([1 / t[clock] for t in found]) for clock in ("wall", "cpu")}
        if apart:
            record[name]["difference"] = apart[name]
    rivals = [n for n in times if n != "ours" and apart.get(n, 0.0) <= tolerance]
    for clock in ("wall", "cpu"):
        best = max(rivals, key=lambda n: record[n][clock]["median"])
        record[f"ratio_{clock}"] = record["ours"][clock]["median"] / record[best][clock]["median"]
        record[f"fastest_{clock}"] = best
    return record


def cell_of(found: dict[str, Any], tolerance: float) -> str:
    """Return a contestant's figures as they stand in the table."""
    speed = f"{found['cpu']['median']:.0f} ({found['wall']['median']:.0f})"
    off = found.get("difference", 0.0)
    return f"{speed}, {off:.1f} off" if off > tolerance else speed


def print_speed(speed: dict[str, Any], names: list[str], absent: dict[str, str]) -> None:
    table = Table(title="samples/s of one core: by processor time (by wall clock)", title_justify="left")
    table.add_column("")
    for setting in speed:
        table.add_column(setting, justify="right")
    for name in names:
        cells = [cell_of(r[name], TOLERANCE.get(s.rpartition(" ")[0], 0.0)) for s, r in speed.items()]
        table.add_row(name, *cells)
    for name in absent:
        table.add_row(name, "absent")
    ratios = [f"{r['ratio_cpu']:.2f} ({r['ratio_wall']:.2f})" for r in speed.values()]
    table.add_row("ours / fastest peer", *ratios)
    console = Console(width=160)
    console.print(table)
    for reason in sorted(set(absent.values())):
        console.print(f"absent: {reason}", highlight=False)


def measure_parts(work: Path) -> dict[str, Any]:
    """Return and show where the time of our stream goes."""
    parts: dict[str, Any] = {}
    for source, mode in SETTINGS:
        parts[f"{source} {mode}"] = run_worker(sys.executable, "stages", mode, place_of(work, source))
    table = Table(title="ours: processor time in µs a sample", title_justify="left")
    table.add_column("")
    for setting in parts:
        table.add_column(setting, justify="right")
    for part in next(iter(parts.values())):
        digits = 2 if part.startswith("share") else 0
        table.add_row(part, *(f"{p[part]:.{digits}f}" for p in parts.values()))
    Console(width=140).print(table)
    return parts


def measure_resume(arguments: Arguments, absent: dict[str, str]) -> dict[str, Any]:
    """Return and show the seconds to the first batch near the end of an epoch."""
    resuming: dict[str, Any] = {}
    for _ in range(min(arguments.rounds, 3)):
        for name in RESUMING:
            if f"{name} + torchvision" not in absent:
                python = arguments.peers if need_of(name) else sys.executable
                found = run_worker(python, "resume", name, place_of(arguments.work, "512"))
                resuming.setdefault(name, []).append(found)
    resumed = {n: {c: spread([t[c] for t in times]) for c in ("wall", "cpu")} for n, times in resuming.items()}
    table = Table(title=f"512 px, seconds to the first batch at {RESUME_AT:.0%} of an epoch", title_justify="left")
    for column in ("", "wall", "processor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, clocks in resumed.items():
        table.add_row(name, *(f"{clocks[c]['median']:.3f}" for c in ("wall", "cpu")))
    Console(width=140).print(table)
    return resumed


def measure_raw(arguments: Arguments) -> dict[str, Any]:
    """Return and show MB/s without decoding."""
    rates = {s: run_worker(sys.executable, "raw", arguments.rounds, arguments.work / s) for s in ("224", "512")}
    table = Table(title="MB/s without decoding: from the page cache (after it was dropped)", title_justify="left")
    for column in ("", *rates):
        table.add_column(column, justify="left" if not column else "right")
    for way in next(iter(rates.values())):
        table.add_row(way, *(f"{r[way]['warm']:.0f} ({r[way]['cold']:.0f})" for r in rates.values()))
        table.add_row("  by processor time", *(f"{r[way]['warm cpu']:.0f}" for r in rates.values()))
    Console(width=140).print(table)
    return rates


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        from bench.stream_worker import work  # with torch, for which --help does not wait

        work(sys.argv[2:])
        return
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.stream")
    check_python(arguments.peers)
    absent = find_absent(arguments.peers)
    mosaicml = "mosaicml + PIL" not in absent

    def write_mds(place: Path) -> object:
        return run_worker(arguments.peers, "write-mds", place)

    build(arguments.data, arguments.images, arguments.work, write_mds if mosaicml else None)
    names = [n for n in CONTESTANTS if n not in absent]
    speed = {f"{source} {mode}": measure(arguments, names, source, mode) for source, mode in SETTINGS}
    print_speed(speed, names, absent)
    build_features(arguments.work / "features")
    features = measure(arguments, list(FEATURE_CONTESTANTS), "features", "features")
    print_speed({"features": features}, list(FEATURE_CONTESTANTS), {})
    record: dict[str, Any] = {"images": arguments.images, "rounds": arguments.rounds, "batch": BATCH, "size": SIZE}
    record["absent"] = absent
    record["samples_per_second"] = speed
    record["feature_samples_per_second"] = {"batch": FEATURE_BATCH, **features}
    record["microseconds_per_sample"] = measure_parts(arguments.work)
    record["resume_seconds"] = measure_resume(arguments, absent)
    record["raw_mb_per_second"] = measure_raw(arguments)
    print(f"written to {write_results(arguments.name, record)}")


if __name__ == "__main__":
    run_main(main)
