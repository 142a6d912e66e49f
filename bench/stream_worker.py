"""What a process of bench/stream.py does: serve a contestant, time a resume, the stages of ours, raw reads."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench.stream_data import BATCH, write_mds
from bench.stream_decoders import SIZE
from bench.stream_peers import CONTESTANTS, FEATURE_CONTESTANTS, RESUMING
from cmgan_dist.config.fields import StreamConfig

RAW_PASSES = 10


def work(words: list[str]) -> None:
    """Do one task, ``TASK [WORDS] FOLDER``, and print ``answer JSON``."""
    torch.set_num_threads(1)
    what, *rest = words
    if what == "serve":
        serve(rest[0], Path(rest[1]), rest[2])
        return
    place = Path(rest[-1])
    tasks: dict[str, Callable[[], Any]] = {
        "write-mds": lambda: write_mds(place),
        "resume": lambda: time_resume(rest[0], place),
        "stages": lambda: stages(place, rest[0]),
        "raw": lambda: raw(place, int(rest[0])),
    }
    print("answer", json.dumps(tasks[what]()), flush=True)


def clocked(work: Callable[[], int]) -> dict[str, float]:
    """Wall and processor seconds for each of the samples that `work` says it has read."""
    wall, cpu = time.perf_counter(), time.process_time()
    samples = work()
    return {"wall": (time.perf_counter() - wall) / samples, "cpu": (time.process_time() - cpu) / samples}


def serve(name: str, place: Path, mode: str) -> None:
    """Times an epoch, less its first batch, for every line on stdin; or gives the pixels of the keys on the line.

    Its first answer says that it is ready."""
    kind, how = (FEATURE_CONTESTANTS if mode == "features" else CONTESTANTS)[name]
    contestant = kind(place, how, mode == "train")
    print("answer null", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "keys" in order:
            found: dict[str, np.ndarray] = {}
            for image, keys in contestant.batches():
                found |= {k: image[i].numpy().copy() for i, k in enumerate(keys) if k in set(order["keys"])}
            np.savez(order["path"], **cast(dict[str, Any], found))
            answer: dict[str, float] = {}
        else:
            batches = contestant.batches()
            next(batches)
            answer = clocked(lambda batches=batches: sum(len(image) for image, _ in batches))  # type: ignore[misc]
        print("answer", json.dumps(answer), flush=True)


def time_resume(name: str, place: Path) -> dict[str, float]:
    first = RESUMING[name].resume(place)

    def once() -> int:
        first()
        return 1

    return clocked(once)


def stages(place: Path, mode: str) -> dict[str, float]:
    """Return the processor microseconds a sample of each part of our stream: where its time goes."""
    from cmgan_dist.data.order import random_for
    from cmgan_dist.data.reader import ShardReader
    from cmgan_dist.data.stream import Stream

    reader = ShardReader(str(place / "shards"), "train")
    files = [s.image for s in reader if isinstance(s.image, bytes)]
    stream = Stream(str(place / "shards"), StreamConfig(global_batch=BATCH, augment=mode == "train"), seed=0)

    def fresh() -> list[random.Random | None]:
        return [random_for(i, 6) if mode == "train" else None for i in range(len(files))]

    def everything() -> int:
        batches = itertools.islice(stream.batches(0), stream.epoch_samples // BATCH)
        return sum(len(b.image) for b in batches)

    shapes = decoded_shapes(files, fresh())
    times: dict[str, list[float]] = {}
    for _ in range(3):
        draws = fresh()
        parts: dict[str, Callable[[], int]] = {
            "read": lambda: sum(1 for _ in reader),
            "eighth": lambda: decode_all(files, [(1, 1)] * len(files)),
            "libjpeg": lambda: decode_all(files, shapes),
            "picture": lambda draws=draws: make_pictures(files, draws),  # type: ignore[misc]
            "everything": everything,
        }
        for part, work in parts.items():
            times.setdefault(part, []).append(1e6 * clocked(work)["cpu"])
    cost = {part: statistics.median(values) for part, values in times.items()}
    return {
        "all": cost["everything"],
        "libjpeg": cost["libjpeg"],
        "of that entropy decoding, about": cost["eighth"],
        "crop and resize": cost["picture"] - cost["libjpeg"],
        "read and parse": cost["read"],
        "plan and batch": cost["everything"] - cost["picture"] - cost["read"],
        "share of libjpeg": cost["libjpeg"] / cost["everything"],
    }


def make_pictures(files: list[bytes], draws: list[random.Random | None]) -> int:
    """Decode, cut and resize every file as the stream does; return their number."""
    from cmgan_dist.data.image import decode_image

    for data, draw in zip(files, draws, strict=True):
        decode_image(data, SIZE, draw)
    return len(files)


def decode_all(files: list[bytes], shapes: list[tuple[int, int]]) -> int:
    """Let libjpeg alone decode every file, to at least (width, height); return their number."""
    simplejpeg: Any = import_module("simplejpeg")
    for data, (width, height) in zip(files, shapes, strict=True):
        simplejpeg.decode_jpeg(data, "RGBX", min_width=width, min_height=height)
    return len(files)


def decoded_shapes(files: list[bytes], draws: list[random.Random | None]) -> list[tuple[int, int]]:
    """Return the least (width, height) that our decoding asks libjpeg for, file by file."""
    simplejpeg: Any = import_module("simplejpeg")
    decode, shapes = simplejpeg.decode_jpeg, []

    def note(data: bytes, *args: object, **least: int) -> Any:
        shapes.append((least["min_width"], least["min_height"]))
        return decode(data, *args, **least)

    simplejpeg.decode_jpeg = note
    try:
        make_pictures(files, draws)
    finally:
        simplejpeg.decode_jpeg = decode
    return shapes


def _drop_cache(files: list[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def raw(place: Path, rounds: int) -> dict[str, dict[str, float]]:
    """MB/s without decoding: from the page cache (warm; by processor time: warm cpu), after it was dropped (cold).

    Ours and webdataset give the key and each member's bytes of every sample, nothing parsed. Warm are RAW_PASSES passes
    over the shards, since what it takes to open them is no small part of one."""
    from cmgan_dist.data.reader import ShardReader

    wds: Any = import_module("webdataset")
    tars = sorted((place / "shards").glob("*.tar"))
    total = sum(p.stat().st_size for p in tars) / 1e6

    def ours(passes: int) -> None:
        reader = ShardReader(str(place / "shards"), "train")
        for _ in range(passes):
            for _ in reader.raw_samples():
                pass

    def theirs(passes: int) -> None:
        for _ in wds.WebDataset([str(p) for p in tars] * passes, shardshuffle=False):
            pass

    def cat(passes: int) -> None:
        with open(os.devnull, "wb") as nothing:
            subprocess.run(["cat", *map(str, tars * passes)], stdout=nothing, check=True)

    def cpu() -> float:
        if way != "cat":
            return time.process_time()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    ways = {"cat": cat, "ours": ours, "webdataset": theirs}
    found: dict[str, dict[str, list[float]]] = {way: {"warm": [], "cold": [], "warm cpu": []} for way in ways}
    for _ in range(rounds):
        for way, read in ways.items():
            for state, passes in (("cold", 1), ("warm", RAW_PASSES)):
                if state == "cold":
                    _drop_cache(tars)
                start, start_cpu = time.perf_counter(), cpu()
                read(passes)
                found[way][state].append(passes * total / (time.perf_counter() - start))
            found[way]["warm cpu"].append(RAW_PASSES * total / (cpu() - start_cpu))
    return {way: {state: statistics.median(v) for state, v in states.items()} for way, states in found.items()}
