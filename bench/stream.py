"""Samples per second of one core: this stream beside webdataset, mosaicml-streaming and ImageFolder; resume; raw reads.

    python -m bench.stream --data data/flickr8k [--mosaicml /path/to/python] [--images 2000] [--rounds 5]

One process each, one thread, no workers, the same JPEG bytes, bicubic, uint8 [64, 3, 224, 224] out: ours as a view of
pixels of four bytes, which is how it hands them to the device. In every round the contestants take turns; a figure is
the median over the rounds. On a machine that others use too the processor time is the figure to trust. The 512-px files
are made here: `512` is each picture enlarged, `512 detail` cut from nine side by side, so that it has the detail of a
photograph reduced to 512 px. Contestants:

    ours                 cmgan_dist.data.stream.Stream: always shuffled, texts parsed
    webdataset + PIL     decode("pil"); + torchvision: torchvision.io.decode_jpeg
    mosaicml + ...       StreamingDataset and StreamingDataLoader on MDS; the bytes decoded in the same two ways
    ImageFolder + ...    the PIL loader, or torchvision.io.decode_image; DataLoader

`eval` takes the centre (and only ours is shuffled), `train` a random resized crop and a flip (all are shuffled).
`features` are shards of .npy arrays of the shape that `python -m shards features` writes of Flickr8k, [1280] and
[5, 384], one of the five drawn, in batches of 1024; webdataset decodes them itself and is not shuffled.
mosaicml-streaming pins an old numpy: install it with --no-deps in an environment of its own and name its python.
Writes bench/results/stream.json.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.common import Worker, spread, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.errors import BadInput, run_main

ROOT = Path(__file__).resolve().parents[1]
SIZE, BATCH = 224, 64
CROP_AREA, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
PIXELS = 64
"""Pictures that are compared before anything is timed."""
TOLERANCE = {"224": 1.0, "512": 2.0, "512 detail": 4.0}
"""Mean absolute difference in grey levels from Pillow's decoding and bicubic resize, by source."""
SETTINGS = (("224", "eval"), ("224", "train"), ("512", "eval"), ("512", "train"), ("512 detail", "eval"))
RESUME_AT = 0.9
RAW_PASSES = 10
FEATURES, FEATURE_SHARDS, FEATURE_BATCH = ((1280,), (5, 384)), 8, 1024
"""Shapes of the image's and the texts' features; shards, of one batch each."""

Batches = Iterator[tuple[Tensor, list[str]]]
"""uint8 [64, 3, 224, 224] and the keys (empty where a shuffled loader gives none)."""


@dataclass
class Arguments:
    """Time the stream against its peers and write bench/results/stream.json."""

    data: Path
    """Folder of shards with encoded images: Flickr8k by `python -m shards build flickr8k`."""
    images: int = 2000
    """Samples of the train split that are used."""
    rounds: int = 5
    """Rounds; in each all contestants take turns."""
    work: Path = Path("runs/bench-stream")
    """Where the data of all contestants is built."""
    mosaicml: str = sys.executable
    """Python that has mosaicml-streaming; without it that contestant is left out."""


# ---------------------------------------------------------------------------------------------- data


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


def build(arguments: Arguments) -> None:
    """work/SOURCE/{shards,folder,mds}, unless they are there."""
    from cmgan_dist.data.reader import ShardReader

    samples = list(itertools.islice(ShardReader(str(arguments.data), "train"), arguments.images))
    pictures = [s.image for s in samples if isinstance(s.image, bytes)]
    if len(pictures) < max(len(samples), 2 * BATCH):
        raise BadInput(f"{arguments.data} has fewer than {2 * BATCH} encoded images in its train split: name another")
    for source, make in SOURCES.items():
        place = arguments.work / source.replace(" ", "-")
        done = place / f"done-{len(samples)}"
        if done.is_file():
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
                    for extension, data in (("jpg", picture), ("json", record)):
                        member = tarfile.TarInfo(f"{samples[i].key}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    (place / "folder" / "all" / f"{samples[i].key}.jpg").write_bytes(picture)
        index = [sys.executable, "-m", "shards", "index", str(place / "shards")]
        subprocess.run(index, check=True, capture_output=True, cwd=ROOT)
        if has_mosaicml(arguments):
            run_worker(arguments.mosaicml, "write-mds", place)
        done.touch()


def build_features(place: Path) -> None:
    """place/shards: features drawn at random, unless they are there."""
    if (place / "done").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    (place / "shards").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in track(range(FEATURE_SHARDS), "building features", console=Console(stderr=True)):
        with tarfile.open(place / "shards" / f"train-{shard:06d}.tar", "w") as tar:
            for i in range(FEATURE_BATCH):
                for name, shape in zip(("image", "text"), FEATURES, strict=True):
                    out = io.BytesIO()
                    np.save(out, rng.normal(size=shape).astype(np.float32))
                    member = tarfile.TarInfo(f"{shard}-{i:04d}.{name}.npy")
                    member.size = len(out.getvalue())
                    tar.addfile(member, io.BytesIO(out.getvalue()))
    index = [sys.executable, "-m", "shards", "index", str(place / "shards")]
    subprocess.run(index, check=True, capture_output=True, cwd=ROOT)
    (place / "done").touch()


def write_mds(place: Path) -> None:
    """The shards' samples in mosaicml-streaming's own format."""
    from cmgan_dist.data.reader import ShardReader

    streaming: Any = import_module("streaming")
    columns = {"key": "str", "image": "bytes", "texts": "json"}
    with streaming.MDSWriter(out=str(place / "mds"), columns=columns) as writer:
        for sample in ShardReader(str(place / "shards"), "train"):
            writer.write({"key": sample.key, "image": sample.image, "texts": sample.texts})


# ---------------------------------------------------------------------------------------------- contestants


def transform(train: bool) -> Any:
    """PIL image or uint8 tensor [3, h, w] -> [3, 224, 224], of the same kind."""
    v2: Any = import_module("torchvision.transforms.v2")
    bicubic = v2.InterpolationMode.BICUBIC
    if train:
        crop = v2.RandomResizedCrop(SIZE, CROP_AREA, CROP_RATIO, interpolation=bicubic, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    return v2.Compose([v2.Resize(SIZE, interpolation=bicubic, antialias=True), v2.CenterCrop(SIZE)])


def decoder(how: str, train: bool) -> Callable[[bytes], Tensor]:
    """JPEG bytes -> uint8 [3, 224, 224] as the peers' users write it."""
    tv: Any = import_module("torchvision")
    change = transform(train)

    def by_pil(data: bytes) -> Tensor:
        image = change(Image.open(io.BytesIO(data)).convert("RGB"))
        tensor: Tensor = tv.transforms.v2.functional.pil_to_tensor(image)
        return tensor

    def by_torchvision(data: bytes) -> Tensor:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensor: Tensor = change(tv.io.decode_jpeg(raw, mode=tv.io.ImageReadMode.RGB))
        return tensor

    return by_pil if how == "PIL" else by_torchvision


class Ours:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        from cmgan_dist.data.stream import Stream

        self.stream = Stream(str(place / "shards"), StreamConfig(global_batch=BATCH, augment=train), seed=0)

    def batches(self) -> Batches:
        for batch in itertools.islice(self.stream.batches(0), self.stream.epoch_samples // BATCH):
            assert not batch.bad, batch.bad
            yield batch.image[..., :3].movedim(-1, 1), batch.keys

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        from cmgan_dist.data.stream import Stream

        def first() -> object:
            stream = Stream(str(place / "shards"), StreamConfig(global_batch=BATCH), seed=0)
            return next(stream.batches(int(RESUME_AT * stream.epoch_samples) // BATCH * BATCH))

        return first


def _record(sample: dict[str, Any]) -> tuple[Tensor, str]:
    return sample["jpg"], sample["__key__"]


class WebDataset:
    def __init__(self, place: Path, how: str, train: bool, skip: int = 0) -> None:
        wds: Any = import_module("webdataset")
        tars = sorted(str(p) for p in (place / "shards").glob("*.tar"))
        change, decode = transform(train), decoder(how, train)
        to_tensor = import_module("torchvision.transforms.v2.functional").pil_to_tensor
        data = wds.WebDataset(tars, shardshuffle=len(tars) if train else False, seed=0)
        data = data.slice(skip, None) if skip else data
        data = data.shuffle(1000) if train else data
        if how == "PIL":
            data = data.decode("pil").map_dict(jpg=lambda image: to_tensor(change(image)))
        else:
            data = data.decode(wds.handle_extension("jpg", decode))
        self.loader = wds.WebLoader(data.map(_record), batch_size=BATCH, num_workers=0, drop_last=True)

    def batches(self) -> Batches:
        for image, keys in self.loader:
            yield image, list(keys)

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        samples = int(RESUME_AT * count(place)) // BATCH * BATCH
        return lambda: next(WebDataset(place, "torchvision", train=True, skip=samples).batches())


class Mosaicml:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        streaming: Any = import_module("streaming")
        decode = decoder(how, train)

        class Decoded(streaming.StreamingDataset):
            def __getitem__(self, at: int) -> tuple[Tensor, str]:
                sample = super().__getitem__(at)
                return decode(sample["image"]), sample["key"]

        self.data = Decoded(local=str(place / "mds"), shuffle=train, batch_size=BATCH, num_canonical_nodes=1)
        self.loader = streaming.StreamingDataLoader(self.data, batch_size=BATCH, num_workers=0, drop_last=True)

    def batches(self) -> Batches:
        for image, keys in self.loader:
            yield image, list(keys)

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        before = Mosaicml(place, "torchvision", train=True)
        for _ in itertools.islice(before.loader, int(RESUME_AT * count(place)) // BATCH):
            pass
        state = before.loader.state_dict()
        del before
        import_module("streaming.base.util").clean_stale_shared_memory()

        def first() -> object:
            again = Mosaicml(place, "torchvision", train=True)
            again.loader.load_state_dict(state)
            return next(iter(again.loader))

        return first


class ImageFolder:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        tv: Any = import_module("torchvision")
        change = transform(train)

        def load(path: str) -> Tensor:
            tensor: Tensor = tv.io.decode_image(path, mode=tv.io.ImageReadMode.RGB)
            return tensor

        if how == "PIL":
            to_tensor = tv.transforms.v2.PILToTensor()
            self.data = tv.datasets.ImageFolder(place / "folder", tv.transforms.v2.Compose([change, to_tensor]))
        else:
            self.data = tv.datasets.ImageFolder(place / "folder", change, loader=load)
        self.shuffled = train
        self.loader = torch.utils.data.DataLoader(
            self.data, BATCH, shuffle=train, drop_last=True, generator=torch.Generator().manual_seed(0)
        )

    def batches(self) -> Batches:
        keys = [Path(path).stem for path, _ in self.data.samples]
        for i, (image, _) in enumerate(self.loader):
            yield image, [] if self.shuffled else keys[i * BATCH : (i + 1) * BATCH]

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        batches = int(RESUME_AT * count(place)) // BATCH
        return lambda: next(itertools.islice(ImageFolder(place, "torchvision", True).batches(), batches, None))


CONTESTANTS: dict[str, tuple[Any, str]] = {
    "ours": (Ours, ""),
    "webdataset + PIL": (WebDataset, "PIL"),
    "webdataset + torchvision": (WebDataset, "torchvision"),
    "mosaicml + PIL": (Mosaicml, "PIL"),
    "mosaicml + torchvision": (Mosaicml, "torchvision"),
    "ImageFolder + PIL": (ImageFolder, "PIL"),
    "ImageFolder + torchvision": (ImageFolder, "torchvision"),
}


class OurFeatures:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        from cmgan_dist.data.stream import Stream

        self.stream = Stream(str(place / "shards"), StreamConfig(global_batch=FEATURE_BATCH), seed=0)

    def batches(self) -> Batches:
        for batch in itertools.islice(self.stream.batches(0), self.stream.epoch_samples // FEATURE_BATCH):
            assert not batch.bad, batch.bad
            yield batch.image, batch.keys


class WebDatasetFeatures:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        wds: Any = import_module("webdataset")
        tars = sorted(str(p) for p in (place / "shards").glob("*.tar"))
        rng = np.random.default_rng(0)

        def drawn(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
            texts = sample["text.npy"]
            return sample["image.npy"], texts[rng.integers(len(texts))], sample["__key__"]

        data = wds.WebDataset(tars, shardshuffle=False).decode().map(drawn)
        self.loader = wds.WebLoader(data, batch_size=FEATURE_BATCH, num_workers=0, drop_last=True)

    def batches(self) -> Batches:
        for image, _, keys in self.loader:
            yield image, list(keys)


FEATURE_CONTESTANTS: dict[str, tuple[Any, str]] = {"ours": (OurFeatures, ""), "webdataset": (WebDatasetFeatures, "")}
RESUMING: dict[str, Any] = {
    "ours": Ours,
    "webdataset": WebDataset,
    "mosaicml": Mosaicml,
    "ImageFolder": ImageFolder,
}


def count(place: Path) -> int:
    return len(os.listdir(place / "folder" / "all"))


# ---------------------------------------------------------------------------------------------- what a worker does


def clocked(work: Callable[[], int]) -> dict[str, float]:
    """Wall and processor seconds for each of the samples that `work` says it has read."""
    wall, cpu = time.perf_counter(), time.process_time()
    samples = work()
    return {"wall": (time.perf_counter() - wall) / samples, "cpu": (time.process_time() - cpu) / samples}


def serve(name: str, place: Path, mode: str) -> None:
    """Times an epoch, less its first batch, for every line on stdin; or gives the pixels of the keys on the line."""
    kind, how = (FEATURE_CONTESTANTS if mode == "features" else CONTESTANTS)[name]
    contestant = kind(place, how, mode == "train")
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
    """Processor microseconds a sample: where our time goes."""
    simplejpeg: Any = import_module("simplejpeg")
    from cmgan_dist.data.image import decode_image
    from cmgan_dist.data.order import generator_for
    from cmgan_dist.data.reader import ShardReader
    from cmgan_dist.data.stream import Stream

    reader = ShardReader(str(place / "shards"), "train")
    samples = list(reader)
    files = [s.image for s in samples if isinstance(s.image, bytes)]
    draws: list[np.random.Generator | None]
    shapes: list[tuple[int, int]] = []

    def fresh() -> None:
        nonlocal draws
        draws = [generator_for(i, 6) if mode == "train" else None for i in range(len(files))]

    def note(data: bytes, *args: object, **least: int) -> Any:
        shapes.append((least["min_width"], least["min_height"]))
        return decode(data, *args, **least)

    decode, simplejpeg.decode_jpeg = simplejpeg.decode_jpeg, note
    fresh()
    for data, draw in zip(files, draws, strict=True):
        decode_image(data, SIZE, draw)
    simplejpeg.decode_jpeg = decode

    def read() -> int:
        return sum(1 for _ in reader)

    def libjpeg() -> int:
        for data, (width, height) in zip(files, shapes, strict=True):
            decode(data, "RGBX", min_width=width, min_height=height)
        return len(files)

    def eighth() -> int:
        for data in files:
            decode(data, "RGBX", min_width=1, min_height=1)
        return len(files)

    def picture() -> int:
        for data, draw in zip(files, draws, strict=True):
            decode_image(data, SIZE, draw)
        return len(files)

    stream = Stream(str(place / "shards"), StreamConfig(global_batch=BATCH, augment=mode == "train"), seed=0)

    def everything() -> int:
        batches = itertools.islice(stream.batches(0), stream.epoch_samples // BATCH)
        return sum(len(b.image) for b in batches)

    parts = {"read": read, "eighth": eighth, "libjpeg": libjpeg, "picture": picture, "everything": everything}
    times: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(3):
        fresh()
        for part, work in parts.items():
            times[part].append(1e6 * clocked(work)["cpu"])
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


# ---------------------------------------------------------------------------------------------- the run


def command(python: str, *words: object) -> list[str]:
    return [python, str(Path(__file__).resolve()), "worker", *map(str, words)]


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


def has_mosaicml(arguments: Arguments) -> bool:
    probe = [arguments.mosaicml, "-c", "import streaming"]
    return not subprocess.run(probe, capture_output=True, check=False).returncode


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
    """One setting: pixels first, then the rounds."""
    place = arguments.work / source.replace(" ", "-")
    pythons = {name: arguments.mosaicml if name.startswith("mosaicml") else sys.executable for name in names}
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            workers[name] = Worker(command(pythons[name], "serve", name, place, mode), env=environment())
        apart = differences(place, workers) if mode == "eval" else {}
        if mode == "features":
            equal_features(place, workers)
        for name, difference in apart.items():
            if difference > TOLERANCE[source]:
                raise BadInput(f"{name}'s pixels of {source} are {difference:.2f} grey levels off: not comparable")
        times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for i in track(range(arguments.rounds), f"{source} {mode}", console=Console(stderr=True)):
            for name in names if i % 2 == 0 else reversed(names):
                times[name].append(workers[name].ask("{}"))
    finally:
        for worker in workers.values():
            worker.close()
    record: dict[str, Any] = {}
    for name in names:
        record[name] = {clock: spread([1 / t[clock] for t in times[name]]) for clock in ("wall", "cpu")}
        if apart:
            record[name]["difference"] = apart[name]
    rivals = [n for n in names if n != "ours"]
    for clock in ("wall", "cpu"):
        best = max(rivals, key=lambda n: record[n][clock]["median"])
        record[f"ratio_{clock}"] = record["ours"][clock]["median"] / record[best][clock]["median"]
        record[f"fastest_{clock}"] = best
    return record


def print_speed(speed: dict[str, Any], names: list[str]) -> None:
    table = Table(title="samples/s of one core: by processor time (by wall clock)", title_justify="left")
    table.add_column("")
    for setting in speed:
        table.add_column(setting, justify="right")
    for name in names:
        cells = [f"{r[name]['cpu']['median']:.0f} ({r[name]['wall']['median']:.0f})" for r in speed.values()]
        table.add_row(name, *cells)
    ratios = [f"{r['ratio_cpu']:.2f} ({r['ratio_wall']:.2f})" for r in speed.values()]
    table.add_row("ours / fastest peer", *ratios)
    Console(width=140).print(table)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["worker"]:
        what, *words = sys.argv[2:]
        if what == "serve":
            serve(words[0], Path(words[1]), words[2])
            return
        place = Path(words[-1])
        tasks: dict[str, Callable[[], Any]] = {
            "write-mds": lambda: write_mds(place),
            "resume": lambda: time_resume(words[0], place),
            "stages": lambda: stages(place, words[0]),
            "raw": lambda: raw(place, int(words[0])),
        }
        print("answer", json.dumps(tasks[what]()), flush=True)
        return
    arguments = parse(Arguments, sys.argv[1:], prog="bench.stream")
    if arguments.rounds < 1:
        raise BadInput(f"--rounds is {arguments.rounds}: at least 1")
    build(arguments)
    mosaicml = has_mosaicml(arguments)
    if not mosaicml:
        print(f"{arguments.mosaicml} has no mosaicml-streaming: left out", file=sys.stderr)
    names = [n for n in CONTESTANTS if mosaicml or not n.startswith("mosaicml")]
    speed = {f"{source} {mode}": measure(arguments, names, source, mode) for source, mode in SETTINGS}
    print_speed(speed, names)
    build_features(arguments.work / "features")
    features = measure(arguments, list(FEATURE_CONTESTANTS), "features", "features")
    print_speed({"features": features}, list(FEATURE_CONTESTANTS))

    parts: dict[str, Any] = {}
    for source, mode in SETTINGS:
        place = arguments.work / source.replace(" ", "-")
        parts[f"{source} {mode}"] = run_worker(sys.executable, "stages", mode, place)
    table = Table(title="ours: processor time in µs a sample", title_justify="left")
    table.add_column("")
    for setting in parts:
        table.add_column(setting, justify="right")
    for part in next(iter(parts.values())):
        digits = 2 if part.startswith("share") else 0
        table.add_row(part, *(f"{p[part]:.{digits}f}" for p in parts.values()))
    Console(width=140).print(table)

    place = arguments.work / "512"
    resuming: dict[str, Any] = {}
    for _ in range(min(arguments.rounds, 3)):
        for name in RESUMING:
            if mosaicml or name != "mosaicml":
                python = arguments.mosaicml if name == "mosaicml" else sys.executable
                resuming.setdefault(name, []).append(run_worker(python, "resume", name, place))
    resumed = {n: {c: spread([t[c] for t in times]) for c in ("wall", "cpu")} for n, times in resuming.items()}
    table = Table(title=f"512 px, seconds to the first batch at {RESUME_AT:.0%} of an epoch", title_justify="left")
    for column in ("", "wall", "processor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, clocks in resumed.items():
        table.add_row(name, *(f"{clocks[c]['median']:.3f}" for c in ("wall", "cpu")))
    Console(width=140).print(table)

    rates = {s: run_worker(sys.executable, "raw", arguments.rounds, arguments.work / s) for s in ("224", "512")}
    table = Table(title="MB/s without decoding: from the page cache (after it was dropped)", title_justify="left")
    for column in ("", *rates):
        table.add_column(column, justify="left" if not column else "right")
    for way in next(iter(rates.values())):
        table.add_row(way, *(f"{r[way]['warm']:.0f} ({r[way]['cold']:.0f})" for r in rates.values()))
        table.add_row("  by processor time", *(f"{r[way]['warm cpu']:.0f}" for r in rates.values()))
    Console(width=140).print(table)
    record: dict[str, Any] = {"images": arguments.images, "rounds": arguments.rounds, "batch": BATCH, "size": SIZE}
    record["samples_per_second"] = speed
    record["feature_samples_per_second"] = {"batch": FEATURE_BATCH, **features}
    record["microseconds_per_sample"] = parts
    record["resume_seconds"] = resumed
    record["raw_mb_per_second"] = rates
    print(f"written to {write_results('stream', record)}")


if __name__ == "__main__":
    run_main(main)
