"""The data of bench/stream.py: the same samples as shards, as a folder of pictures, in MDS; and features."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from cmgan_dist.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
BATCH = 64
"""Pictures of a batch."""
FEATURES, FEATURE_SHARDS, FEATURE_BATCH = ((1280,), (5, 384)), 8, 1024
"""Shapes of the image's and the texts' features; shards, of one batch each."""


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def _enlarged(pictures: list[bytes], i: int) -> bytes:
    with Image.open(io.BytesIO(pictures[i])) as image:
        return _jpeg(image.convert("RGB").resize((512, 512), Image.Resampling.BICUBIC))


def _nine(pictures: list[bytes], i: int) -> bytes:
    wall = Image.new("RGB", (672, 672))
    for k in range(9):
        with Image.open(io.BytesIO(pictures[(i + 37 * k) % len(pictures)])) as image:
            wall.paste(image.convert("RGB").resize((224, 224)), (224 * (k % 3), 224 * (k // 3)))
    return _jpeg(wall.crop((80, 80, 592, 592)))


SOURCES: dict[str, Callable[[list[bytes], int], bytes]] = {
    "224": lambda pictures, i: pictures[i],
    "512": _enlarged,
    "512 detail": _nine,
}


def build(data: Path, images: int, work: Path, mds: Callable[[Path], object] | None) -> None:
    """Write work/SOURCE/{shards,folder,mds} of every source, unless they are there.

    `mds` writes the format of mosaicml-streaming beside the shards; None leaves it out. Raises BadInput where `data`
    has too few encoded images, or one that is no JPEG, which is what every contestant decodes."""
    from cmgan_dist.data.reader import ShardReader

    samples = list(itertools.islice(ShardReader(str(data), "train"), images))
    pictures = [s.image for s in samples if isinstance(s.image, bytes)]
    if len(pictures) < max(len(samples), 2 * BATCH):
        raise BadInput(f"--data {data} has fewer than {2 * BATCH} encoded images in its train split: name another")
    for sample, picture in zip(samples, pictures, strict=True):
        if not picture.startswith(b"\xff\xd8"):
            raise BadInput(f"--data {data}: the picture of sample {sample.key!r} is no JPEG: name data of JPEGs")
    for source, make in SOURCES.items():
        place = place_of(work, source)
        done = place / f"done-{len(samples)}"
        if done.is_file():
            if mds and not (place / "mds" / "index.json").is_file():  # built where its library was not installed
                shutil.rmtree(place / "mds", ignore_errors=True)
                mds(place)
            continue
        shutil.rmtree(place, ignore_errors=True)
        (place / "shards").mkdir(parents=True)
        (place / "folder" / "all").mkdir(parents=True)
        for first in track(range(0, len(samples), 250), f"building {source}", console=Console(stderr=True)):
            with tarfile.open(place / "shards" / f"train-{first // 250:06d}.tar", "w") as tar:
                for i in range(first, min(first + 250, len(samples))):
                    picture = make(pictures, i)
                    texts = samples[i].texts
                    record = json.dumps({"texts": texts if isinstance(texts, list) else [""]}).encode()
                    add(tar, f"{samples[i].key}.jpg", picture)
                    add(tar, f"{samples[i].key}.json", record)
                    (place / "folder" / "all" / f"{samples[i].key}.jpg").write_bytes(picture)
        index(place / "shards")
        if mds:
            mds(place)
        done.touch()


def place_of(work: Path, source: str) -> Path:
    """Return the folder of a source's data."""
    return work / source.replace(" ", "-")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member to the tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def index(shards: Path) -> None:
    """Write the manifest and the sidecars of a folder of tars."""
    command = [sys.executable, "-m", "shards", "index", str(shards)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def build_features(place: Path, shards: int = FEATURE_SHARDS, samples: int = FEATURE_BATCH) -> None:
    """Write place/shards with features drawn at random, unless they are there."""
    if (place / "done").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    (place / "shards").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in track(range(shards), "building features", console=Console(stderr=True)):
        with tarfile.open(place / "shards" / f"train-{shard:06d}.tar", "w") as tar:
            for i in range(samples):
                for name, shape in zip(("image", "text"), FEATURES, strict=True):
                    out = io.BytesIO()
                    np.save(out, rng.normal(size=shape).astype(np.float32))
                    add(tar, f"{shard}-{i:04d}.{name}.npy", out.getvalue())
    index(place / "shards")
    (place / "done").touch()


def write_mds(place: Path) -> None:
    """The shards' samples in mosaicml-streaming's own format."""
    from cmgan_dist.data.reader import ShardReader

    streaming: Any = import_module("streaming")
    columns = {"key": "str", "image": "bytes", "texts": "json"}
    with streaming.MDSWriter(out=str(place / "mds"), columns=columns) as writer:
        for sample in ShardReader(str(place / "shards"), "train"):
            writer.write({"key": sample.key, "image": sample.image, "texts": sample.texts})


def count(place: Path) -> int:
    """Return the number of pictures that `build` wrote."""
    return len(os.listdir(place / "folder" / "all"))
