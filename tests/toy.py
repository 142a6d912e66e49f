"""What tests share: small data sets made on the spot, small configs and batches, and runs in real processes."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.index import Layout, ShardIndex, index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import DataSpec, Manifest, ShardInfo, load_manifest
from cmgan_dist.data.sample import parse_labels, parse_sample
from cmgan_dist.data.store import ShardStore
from cmgan_dist.data.tar import iter_groups, iter_samples
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.errors import BadInput, run_main
from cmgan_dist.files import sha256_of, write_atomic
from cmgan_dist.models.generator import Generator, build_generator
from cmgan_dist.models.saved import describe_model, save_model, stored_tensors
from cmgan_dist.models.scoring import Objective, Scoring, ScoringSpec, Shares
from cmgan_dist.models.vocabulary import Vocabulary
from cmgan_dist.training.checkpoint import latest, read_checkpoint
from cmgan_dist.training.state import build_networks
from shards.__main__ import main
from shards.scan import scan_shard
from tests.services import forked


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def jpeg(rng: np.random.Generator, height: int = 40, width: int = 48) -> bytes:
    out = io.BytesIO()
    pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((height // 4, width // 4, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """By the standard library, so that our own reader meets what others write."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index_tar(path: Path) -> ShardInfo:
    """Write the sidecar of a tar and return its line of the manifest."""
    with open(path, "rb") as file:
        found = list(iter_groups(file, path.name))
    records = [{m.extension: m.data for m in group}.get("json", b"{}") for group in found]
    end = path.stat().st_size
    if found and (last := found[-1][-1]).header:
        end = last.start + 512 + len(last.data) + -len(last.data) % 512
    labels = [parse_labels(json.loads(record)) for record in records]
    index = ShardIndex.build([group[0].start for group in found], end, labels, [Layout.of(group) for group in found])
    (path.parent / index_name(path.name)).write_bytes(index.to_bytes())
    sidecar = hashlib.sha256(index.to_bytes()).hexdigest()
    return ShardInfo(path.name, len(found), path.stat().st_size, sha256_of(path), sidecar)


def write_manifest(folder: Path, splits: dict[str, list[ShardInfo]], **fields: object) -> None:
    defaults: dict[str, object] = {"name": "toy", "label_kind": "none", "classes": []}
    (folder / "manifest.json").write_text(Manifest(splits=splits, **{**defaults, **fields}).to_json())  # type: ignore[arg-type]


def make_features(
    folder: Path,
    *,
    splits: dict[str, list[int]] | None = None,
    classes: int = 3,
    dims: tuple[int, int] = (12, 7),
    captions: int = 1,
    label_kind: str = "single",
    seed: int = 0,
) -> Path:
    """A data set of features in which image and text of a class lie near each other; `splits`: samples per shard."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    centres = [rng.normal(size=(classes, d)) for d in dims]
    infos: dict[str, list[ShardInfo]] = {}
    for split, counts in (splits or {"train": [40, 25, 31], "val": [24], "test": [24]}).items():
        infos[split] = []
        for shard, count in enumerate(counts):
            members = []
            for i in range(count):
                key = f"{split}{shard}-{i:04d}"
                label = int(rng.integers(classes))
                image = centres[0][label] + 0.5 * rng.normal(size=dims[0])
                text = centres[1][label] + 0.5 * rng.normal(size=(captions, dims[1]))
                members.append((f"{key}.image.npy", npy(image.astype(np.float32))))
                members.append((f"{key}.text.npy", npy((text if captions > 1 else text[0]).astype(np.float32))))
                if label_kind == "single":
                    members.append((f"{key}.json", json.dumps({"label": label}).encode()))
                elif label_kind == "multi":
                    both = sorted({label, int(rng.integers(classes))})
                    members.append((f"{key}.json", json.dumps({"labels": both}).encode()))
            path = folder / f"{split}-{shard:06d}.tar"
            write_tar(path, members)
            infos[split].append(index_tar(path))
    write_manifest(
        folder,
        infos,
        label_kind=label_kind,
        classes=[f"class {c}" for c in range(classes)] if label_kind != "none" else [],
        image="features",
        image_dim=dims[0],
        text="features",
        text_dim=dims[1],
    )
    return folder


def make_raw(
    folder: Path,
    *,
    counts: dict[str, int] | None = None,
    classes: int = 3,
    seed: int = 0,
    spoil: dict[int, str] | None = None,
) -> Path:
    """Small JPEGs with one to three captions each. `spoil`: training sample -> "image", "text" or "label" to break."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "square", "circle", "dog", "boat"]
    folder.mkdir()
    infos: dict[str, list[ShardInfo]] = {}
    for split, count in (counts or {"train": 40, "val": 16, "test": 16}).items():
        members = []
        for i in range(count):
            texts = [" ".join(rng.choice(words, 4)) for _ in range(1 + i % 3)]
            record: dict[str, object] = {"texts": texts, "label": int(rng.integers(classes))}
            image = jpeg(rng)
            fault = (spoil or {}).get(i) if split == "train" else None
            if fault == "image":
                image = image[:200]
            elif fault == "text":
                del record["texts"]
            elif fault == "label":
                record["label"] = classes + 4
            members += [(f"{split}{i}.jpg", image), (f"{split}{i}.json", json.dumps(record).encode())]
        path = folder / f"{split}-000000.tar"
        write_tar(path, members)
        infos[split] = [index_tar(path)]
    write_manifest(folder, infos, label_kind="single", classes=[f"class {c}" for c in range(classes)])
    return folder


# ---------------------------------------------------------------------------------------------- runs in real processes

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int) -> list[str]:
    """The start of a command that runs a script on that many processes of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def run_workers(script: str, processes: int, *words: str, fresh: bool = False) -> str:
    """tests/distributed/SCRIPT on that many processes; its stdout. It must end with 0.

    `fresh`: by torchrun, for what must be set before torch is imported; so is one process, which DeepSpeed takes from
    a launcher only."""
    command = [str(ROOT / "tests" / "distributed" / script), *words]
    if fresh or processes == 1:
        command = [*torchrun(processes), *command]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=400)
    else:
        done = forked.run(command, environment(), processes, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


SMALL = ["--preset", "smoke", "stream.global_batch=16", "train.tracker=none", "train.threads=1", "train.log_every=1"]
SMALL += ["train.report=false"]  # half of the time of a run as small as these


def train_words(data: Path | str, run: Path, *extra: str) -> list[str]:
    """launchers/train.py and its arguments."""
    return [str(ROOT / "launchers" / "train.py"), *SMALL, "--data", str(data), "--output", str(run), *extra]


def command(data: Path | str, run: Path, *extra: str, processes: int = 1, accelerate: bool = False) -> list[str]:
    """launchers/train.py as a user starts it: by python, torchrun or `accelerate launch`."""
    script = train_words(data, run, *extra)
    if accelerate:
        return [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *script]
    if processes == 1:
        return [sys.executable, *script]
    return [*torchrun(processes), *script]


def run_to_end(
    data: Path | str, run: Path, *extra: str, expect: int = 0, processes: int = 1, accelerate: bool = False
) -> subprocess.CompletedProcess[str]:
    """launchers/train.py to its end, forked or by `accelerate launch`, with its exit code checked."""
    if accelerate:
        words = command(data, run, *extra, processes=processes, accelerate=True)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    else:
        done = forked.run(train_words(data, run, *extra), environment(), processes)
    assert done.returncode == expect, done.stderr[-3000:]
    if not expect and "is done" not in done.stderr:
        assert f"{processes} process{'es' * (processes > 1)} on cpu" in done.stderr, "other processes than asked for"
    return done


def call(main: Callable[[], int | None], *words: str) -> tuple[int, str]:
    """The `main` of a command in this process: its exit code, and its lines of stderr that begin with "error: "."""
    said, before, handlers = io.StringIO(), list(sys.argv), list(logging.getLogger().handlers)
    sys.argv = ["program", *words]
    try:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with contextlib.redirect_stderr(said), quiet, pytest.raises(SystemExit) as ended:
            run_main(main)
    finally:
        sys.argv = before
        logging.getLogger().handlers[:] = handlers
    assert isinstance(ended.value.code, int)
    lines = said.getvalue().splitlines()
    return ended.value.code, "\n".join(line for line in lines if line.startswith("error: "))


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("samples_per_s", "memory_gib", "time/")
    kept = [line for line in found if line["kind"] == kind]
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in kept]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: networks and optimisers."""
    found = latest(run)
    assert found is not None
    return read_checkpoint(found)[1]


# ---------------------------------------------------------------------------------------------- batches, networks


def small_config(global_batch: int, **fields: object) -> Config:
    """Small networks; `fields` by dotted name with __ for the dot."""
    config = Config()
    config.model.hidden_dim, config.model.common_dim, config.model.discriminator_dim = 16, 8, 12
    config.stream.global_batch = global_batch
    config.optim.generator_steps = 1
    for name, value in fields.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


def global_batch(rows: int, seed: int, classes: int = 5, dims: tuple[int, int] = (6, 5)) -> Batch:
    """Features of a whole global batch; half of the rows are of the first class, which lie together."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (rows,), generator=rng)
    label[: rows // 2] = 0
    labels = torch.nn.functional.one_hot(label, classes).bool()
    image, text = torch.randn(rows, dims[0], generator=rng), torch.randn(rows, dims[1], generator=rng)
    return Batch(image, text, labels, [f"{seed}-{i}" for i in range(rows)], size=rows)


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of one process."""
    each = batch.size // world
    rows = slice(rank * each, (rank + 1) * each)
    assert batch.labels is not None
    return Batch(batch.image[rows], batch.text[rows], batch.labels[rows], batch.keys[rows], size=each)


def small(**loss: object) -> Config:
    """A config of the reference's shape with small networks; `loss`: fields of config.loss."""
    return small_config(10, optim__generator_steps=5, **{f"loss__{name}": value for name, value in loss.items()})


def make_batch(rows: int = 10, classes: int = 3, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.eye(max(classes, 1)).bool()[torch.arange(rows) % max(classes, 1)] if classes else None
    image, text = torch.randn(rows, 6, generator=rng), torch.randn(rows, 5, generator=rng)
    return Batch(image, text, labels, [str(i) for i in range(rows)], size=rows)


def set_up(config: Config, classes: int = 3):  # type: ignore[no-untyped-def]
    spec = DataSpec([str(c) for c in range(classes)], "single" if classes else "none", 6, 5)
    parallel = Parallel(config.train.precision)
    return build_networks(config, spec, None, parallel), parallel


def mixed_scoring(generator: Generator, classes: int, bank: int = 5) -> Scoring:
    """A scoring of all blocks that has a class head and a bank and standardises, of random numbers, for a generator's
    dimensions."""
    random, tensors = torch.Generator().manual_seed(0), {}
    dims = {"image": generator.image_backbone.dim, "text": generator.text_backbone.dim}
    common = generator.shared.linear[0].weight.shape[0]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    for modality, dim in dims.items():
        tensors |= {f"{modality}_mean": normal(common).double(), f"{modality}_std": 0.5 + normal(common).double() ** 2}
        tensors |= {f"{modality}_pair_weight": normal(dim, 6), f"{modality}_pair_bias": normal(6)}
        if classes:
            head = {"scale": normal(dim).abs(), "landmarks": normal(4, dim).abs(), "weight": normal(4, classes)}
            head |= {"bias": normal(classes), "centre": normal(dim) if modality == "image" else torch.zeros(dim)}
            tensors |= {f"{modality}_class_{name}": tensor for name, tensor in head.items()}
        blocks = {"common": F.normalize(normal(bank, common)), "pair": F.normalize(normal(bank, 6))}
        blocks |= {"posterior": normal(bank, classes).softmax(1)} if classes else {}
        tensors |= {f"{modality}_bank_{name}": block for name, block in blocks.items()}
    one = Shares(0.2 if classes else 0.0, 0.3, 0.5 if classes else 0.7, bank=0.5, sharpness=10.0)
    shares: dict[Objective, Shares] = {"pair": one}
    if classes:
        shares |= {"class": Shares(0.9, 0.1, 0.0), "both": one}
    spec = ScoringSpec("both" if classes else "pair", {}, shares, standardise=True)
    if classes:
        spec = dataclasses.replace(spec, kernels={"image": "rbf", "text": "chi2"}, class_head=0.3)
    return Scoring(spec, tensors, False)


def save_untrained(run: Path, data: Path, config: Config, seed: int = 0, mixed: bool = False) -> Generator:
    """RUN/best of a generator as it is before training, fit for the data set in `data`; the generator, in eval mode.

    `mixed`: with `mixed_scoring`."""
    torch.manual_seed(seed)
    manifest = load_manifest(data)
    vocabulary = Vocabulary(["red", "green", "blue", "dog", "boat"]) if config.model.text.name == "cnn" else None
    spec = DataSpec.of(manifest)
    generator = build_generator(config.model, spec, vocabulary)
    config.data = str(data)
    described = describe_model(config, spec, generator, manifest.name, manifest.attribution, manifest.details)
    stored = stored_tensors(generator)
    scoring = mixed_scoring(generator, len(spec.classes)) if mixed else None
    progress = {"best_position": 0}
    save_model(run / "best", described, config, stored, progress=progress, vocabulary=vocabulary, scoring=scoring)
    return generator.eval()


# ---------------------------------------------------------------------------------------------- remote shards

SHARD_BYTES = 200_000
FORK = multiprocessing.get_context("fork")  # as DataLoader workers are


def body_of(i: int, size: int = SHARD_BYTES) -> bytes:
    """The bytes of the i-th of the shards that a server in tests/services has."""
    return hashlib.shake_128(str(i).encode()).digest(size)


def shard_of(i: int, size: int = SHARD_BYTES) -> ShardInfo:
    """The manifest's line for the i-th shard."""
    return ShardInfo(f"s-{i}.tar", 1, size, hashlib.sha256(body_of(i, size)).hexdigest())


def content_of(store: ShardStore, shard: ShardInfo) -> bytes:
    """What a store gives for a shard; one byte more than it should have would show."""
    while True:
        file = store.open(shard)
        try:
            data = os.pread(file, shard.bytes + 1, 0)
            if len(data) >= shard.bytes or os.fstat(file).st_nlink:
                return data  # else others have evicted it meanwhile
        finally:
            os.close(file)


def run_together(count: int, work: Callable[[int], Any], within_s: float = 20.0) -> list[Any]:
    """What `work(i)` returns in `count` forked processes, or the text of its BadInput."""
    results = FORK.SimpleQueue()

    def child(i: int) -> None:
        try:
            results.put((i, work(i)))
        except BadInput as error:
            results.put((i, str(error)))

    processes = [FORK.Process(target=child, args=[i]) for i in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [p for p in processes if p.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} of {count} processes still run after {within_s} s"
    return [value for _, value in sorted(results.get() for _ in processes)]


def wait_for(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Look every 10 ms until it holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar in memory, of any of the three formats, by the standard library."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


# ---------------------------------------------------------------------------------------------- raw pairs

TEXTS = ["ein Käfer", "红色的花", "قطة صغيرة", "жёлтый дом", "tail 🐕 wag"]


def picture(number: int, size: int = 24, kind: str = "PNG") -> bytes:
    """Encoded image that differs with its number."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size, size)).save(out, kind)
    return out.getvalue()


def fill_folder(folder: Path, names: list[str], text: str = "a {}") -> Path:
    """Write NAME.png and NAME.txt for each name; the pictures are distinct."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(picture(zlib.crc32(name.encode())))
        path.with_suffix(".txt").write_text(text.format(path.name), encoding="utf-8")
    return folder


def run_shards(*args: object) -> int | None:
    return main([str(arg) for arg in args])


def build_folder(raw: Path, output: Path, *args: object) -> Manifest:
    run_shards("build", "folder", raw, "--output", output, "--processes", 1, "--shard-samples", 8, *args)
    return load_manifest(output)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples_of(folder: Path, split: str = "train") -> dict[str, tuple[object, tuple[int, ...]]]:
    """Key -> (texts, labels) of a split, by the schema's own reader."""
    found, manifest = {}, load_manifest(folder)
    for shard in manifest.shards(split):
        with open(folder / shard.name, "rb") as file:
            for key, _, members in iter_samples(file, shard.name):
                sample = parse_sample(key, members, number_of=Judge.of(manifest).number_of)
                found[key] = sample.texts, sample.labels
    return found


def rewrite_tar(path: Path, change: dict[str, bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """Rewrite a tar with changed (None: removed) and extra members."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    members |= change | (extra or {})  # type: ignore[operator]
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def re_sum(folder: Path) -> None:
    """Make manifest and sidecars agree with the tars, so that only a sample's own fault is left to find."""
    manifest = load_manifest(folder)
    for split, shards in manifest.splits.items():
        scans = [scan_shard(folder / shard.name, shard.name) for shard in shards]
        manifest.splits[split] = [scan.info for scan in scans]
        for scan in scans:
            write_atomic(folder / index_name(scan.info.name), scan.index.to_bytes())
    write_atomic(folder / "manifest.json", manifest.to_json())


def shard_samples(folder: Path, name: str) -> dict[str, tuple[object, tuple[int, ...]]]:
    with open(folder / name, "rb") as file:
        parsed = {key: parse_sample(key, members) for key, _, members in iter_samples(file, name)}
    return {key: (sample.texts, sample.labels) for key, sample in parsed.items()}


def table_rows(folder: Path) -> list[dict[str, str]]:
    """Ten images, the first with two captions; every other one has both labels."""
    fill_folder(folder, [f"img/{i}" for i in range(10)])
    rows = [
        {"filepath": f"img/{i}.png", "caption": TEXTS[i % 5], "label": "a|b" if i % 2 else "b", "split": "train"}
        for i in range(10)
    ]
    rows[8]["split"], rows[9]["split"] = "validation", "test"
    return [*rows, {**rows[0], "caption": 'a second, "quoted"\ncaption'}]


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_members(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tarfile.open(path, "w").close()
    rewrite_tar(path, {}, members)


def img2dataset(folder: Path, shards: int = 2, count: int = 4) -> Path:
    """What img2dataset leaves: numbered tars, and a parquet file and statistics beside each."""
    for s in range(shards):
        members = {}
        for i in range(count):
            key = f"{s:05d}{i:04d}"
            record = {"caption": TEXTS[i], "url": f"http://x/{key}", "key": key, "status": "success", "width": 24}
            members[f"{key}.jpg"] = picture(s * count + i, kind="JPEG")
            members[f"{key}.txt"] = TEXTS[i].encode()
            members[f"{key}.json"] = json.dumps(record, indent=4).encode()
        write_members(folder / f"{s:05d}.tar", members)
        (folder / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{s:05d}_stats.json").write_text("{}")
    return folder
