"""Raw shards -> shards of precomputed features, shard by shard, resumable.

The way of a sample: raw tar -> parse, decode -> batch -> backbones -> KEY.image.npy, KEY.text.npy and its label JSON
-> tar of the same name. What is not converted is copied as it is.

Beside each tar stands ``train-000000.features.json``: what it was made from and how. The tar gets its name last, so a
tar with its record is finished and a run that was killed goes on behind it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.data.image import decode_image
from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest
from cmgan_dist.data.sample import IMAGE_EXTENSIONS, parse_sample
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import sha256_of, write_atomic
from cmgan_dist.jobs.local import parallel_map, usable_cores
from cmgan_dist.models.backbones import ImageBackbone, TextBackbone, build_image_backbone, build_text_backbone
from shards.pack import print_sizes
from shards.scan import scan_shard
from shards.shard_file import add_member

IMAGE_MEMBERS = ("image.npy", *IMAGE_EXTENSIONS)
TEXT_MEMBERS = ("text.npy", "txt")
CPU_IMAGES = 8
"""Images that a CPU takes at a time: with 64, half the time goes into fetching memory for activations."""


@dataclass
class FeaturesCommand:
    """Run frozen backbones over a data set once and store what they make of it.

    A modality without a backbone, or one that is stored as features already, is copied. An interrupted run goes on
    where it was; finished shards are kept."""

    data: tyro.conf.Positional[Path]
    """Folder with manifest.json and tars."""
    output: Path
    """Folder for the feature shards and their manifest.json."""
    image_backbone: str = "features"
    """timm model for the images, such as tf_efficientnet_lite0; "features" copies them as they are."""
    image_weights: str = ""
    """"hub", a .pth or .safetensors file, or "package:NAME" for weights in a package."""
    image_size: int = 224
    """Side of the square that the image backbone sees, in pixels."""
    text_backbone: str = "features"
    """"sentence" for a sentence-transformers model; "features" copies the texts as they are."""
    text_weights: str = ""
    """Folder of the model, "hub:NAME" or "package:NAME"."""
    max_tokens: int = 64
    """Longer texts are cut."""
    batch_size: int = 64
    """Samples that go through a backbone at a time; each shard starts its own batches."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored features."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbones run; auto takes a GPU if there is one."""
    processes: int | None = None
    """Processes, each with a shard at a time (None: one a core, on a GPU one). The bytes do not depend on it."""
    skip_bad: bool = False
    """Leave bad samples out, count and list them, instead of stopping at the first."""
    overwrite: bool = False
    """Make shards anew that came from other data or other options, and remove those that have no source."""

    def run(self) -> None:
        write_features(self)


# ---------------------------------------------------------------------------------------------- extraction


@dataclass(frozen=True)
class Options:
    """What a process needs to know; hashable, so that it loads its backbones once."""

    image: tuple[str, str, int] | None
    """(backbone, weights, image size); None: images are copied."""
    text: tuple[str, str, int] | None
    """(backbone, weights, max tokens); None: texts are copied."""
    batch_size: int
    dtype: Literal["float32", "float16"]
    device: str
    decode_threads: int
    skip_bad: bool


class Extractor:
    """The backbones of a process."""

    def __init__(self, options: Options) -> None:
        """Raises BadInput when a backbone cannot be made."""
        self.options = options
        self.image: ImageBackbone | None = None
        self.text: TextBackbone | None = None
        if options.image is not None:
            name, weights, size = options.image
            self.image = build_image_backbone(ImageBackboneConfig(name, weights, image_size=size)).to(options.device)
        if options.text is not None:
            name, weights, tokens = options.text
            self.text = build_text_backbone(TextBackboneConfig(name, weights, max_tokens=tokens)).to(options.device)
        # One thread a process and no TF32: the same bytes for any number of cores, nearly the same on a GPU.
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False
        self.pool = ThreadPoolExecutor(options.decode_threads)

    @torch.no_grad()
    def images(self, images: list[np.ndarray]) -> np.ndarray:
        """n times uint8 [size, size, 4] -> [n, F_i]."""
        assert self.image is not None
        batch = torch.from_numpy(np.stack(images)).to(self.options.device)
        parts = batch.split(len(batch) if batch.is_cuda else CPU_IMAGES)
        made: np.ndarray = torch.cat([self.image(part) for part in parts]).cpu().numpy()
        return made

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        """m texts -> [m, F_t]; texts of like length go together, for little padding."""
        assert self.text is not None
        made = np.empty((len(texts), self.text.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), self.options.batch_size):
            rows = order[first : first + self.options.batch_size]
            tokens = self.text.tokenise([texts[i] for i in rows], self.options.device)
            made[rows] = self.text(tokens).cpu().numpy()
        return made


extractor = lru_cache(maxsize=1)(Extractor)


@dataclass
class _Loaded:
    key: str
    members: dict[str, bytes]
    image: np.ndarray | None
    """uint8 [size, size, 4] when the image is to be converted."""
    texts: list[str] | None
    """When the texts are to be converted."""


def _load(options: Options, key: str, members: dict[str, bytes]) -> _Loaded:
    """Parse a sample and decode what is to be converted. Raises BadSample."""
    sample = parse_sample(key, members)
    loaded = _Loaded(key, members, None, None)
    if options.image is not None:
        if not isinstance(sample.image, bytes):
            raise BadSample("has image features, the manifest says encoded images")
        loaded.image = decode_image(sample.image, options.image[2])
    if options.text is not None:
        if not isinstance(sample.texts, list):
            raise BadSample("has text features, the manifest says texts")
        loaded.texts = sample.texts
    return loaded


def _npy(array: np.ndarray, dtype: str) -> bytes:
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise BadSample(f"its features do not fit into {dtype} (NaN or Inf)")
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _feature_members(
    loaded: _Loaded, image: np.ndarray | None, text: np.ndarray | None, dtype: str
) -> Iterator[tuple[str, bytes]]:
    """(extension, bytes) of a sample's members in their order in the tar. Raises BadSample."""
    members = loaded.members
    if image is not None:
        yield "image.npy", _npy(image, dtype)
    else:
        yield from ((e, members[e]) for e in IMAGE_MEMBERS if e in members)
    if text is not None:
        yield "text.npy", _npy(text, dtype)
    else:
        yield from ((e, members[e]) for e in TEXT_MEMBERS if e in members)
    if "json" in members:
        record = json.loads(members["json"])
        if text is not None:
            record.pop("texts", None)
        if record:
            yield "json", json.dumps(record, sort_keys=True, ensure_ascii=False).encode()


def _feature_samples(
    made: Extractor, samples: Iterable[tuple[str, int, dict[str, bytes]]], name: str, left_out: list[str]
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """(key, members) of the good samples. Bad ones go to `left_out`; raises BadInput unless they are skipped."""
    options = made.options

    def good(key: str, work: Any, *args: Any) -> Any:
        """``work(*args)``, or None for a bad sample."""
        try:
            return work(*args)
        except BadSample as error:
            message = f"{name} sample {key}: {error}"
            if not options.skip_bad:
                raise BadInput(f"{message}; mend it, or pass --skip-bad to leave such samples out") from None
            left_out.append(message)
            return None

    samples = iter(samples)
    while batch := list(itertools.islice(samples, options.batch_size)):
        tries = [made.pool.submit(_load, options, key, members) for key, _, members in batch]
        rows = [good(key, future.result) for (key, _, _), future in zip(batch, tries, strict=True)]
        rows = [row for row in rows if row is not None]
        if not rows:
            continue
        images = made.images([row.image for row in rows]) if options.image is not None else [None] * len(rows)
        texts: list[np.ndarray | None] = [None] * len(rows)
        if options.text is not None:
            ends = np.cumsum([len(row.texts) for row in rows])
            texts = list(np.split(made.texts([text for row in rows for text in row.texts]), ends[:-1]))
        for row, image, text in zip(rows, images, texts, strict=True):
            members = good(row.key, lambda *a: list(_feature_members(*a)), row, image, text, options.dtype)
            if members is not None:
                yield row.key, members


# ---------------------------------------------------------------------------------------------- one shard


def record_name(shard: str) -> str:
    """``train-000000.tar`` -> ``train-000000.features.json``."""
    return shard.removesuffix(".tar") + ".features.json"


def write_shard(
    options: Options, data: Path, output: Path, source: ShardInfo, settings: dict[str, Any]
) -> tuple[ShardInfo | None, list[str]]:
    """Write the features of a shard: the tar aside, its index, its record, then the tar's name.

    Returns what was written (None: no good sample) and what was left out. Raises BadInput on a bad sample."""
    if sha256_of(data / source.name) != source.sha256:
        raise BadInput(f"{data / source.name} is not what its manifest says: see 'python -m shards verify {data}'")
    made = extractor(options)
    final = output / source.name
    aside = output / f".{source.name}.{os.getpid()}.tmp"
    left_out: list[str] = []
    written = 0
    try:
        with open(data / source.name, "rb") as raw, open(aside, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
                for key, members in _feature_samples(made, iter_samples(raw, source.name), source.name, left_out):
                    written += 1
                    for extension, content in members:
                        add_member(tar, f"{key}.{extension}", content)
            file.flush()
            os.fsync(file.fileno())
        if not written:
            return None, left_out
        scan = scan_shard(aside, source.name)
        write_atomic(output / index_name(source.name), scan.index.to_bytes())
        record = {"source": source.sha256, "settings": settings, "shard": asdict(scan.info), "left_out": left_out}
        write_atomic(output / record_name(source.name), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        os.replace(aside, final)
    except BadSample as error:
        raise BadInput(f"{error}: see 'python -m shards verify {data}'") from None
    except OSError as error:
        raise BadInput(f"cannot write {final}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    return scan.info, left_out


def _finished(
    output: Path, source: ShardInfo, settings: dict[str, Any], skip_bad: bool
) -> tuple[ShardInfo, list[str]] | None:
    """What an earlier run wrote for this source with these settings; None when there is no tar.

    Raises BadInput when the tar was made otherwise."""
    path = output / source.name
    if not path.exists():
        return None
    try:
        record = json.loads((output / record_name(source.name)).read_text(encoding="utf-8"))
        same = (record["source"], record["settings"]) == (source.sha256, settings)
        info, left_out = ShardInfo(**record["shard"]), list(record["left_out"])
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same or info.bytes != path.stat().st_size or (left_out and not skip_bad):
        raise BadInput(
            f"{path} was made from other data or with other options: "
            "name a new --output, or pass --overwrite to make it anew"
        )
    return info, left_out


# ---------------------------------------------------------------------------------------------- the whole output


def weights_sha256(module: nn.Module) -> str:
    """A checksum of a module's parameters and buffers by name, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _options(command: FeaturesCommand, manifest: Manifest) -> tuple[Options, int]:
    """(what a process needs to know, number of processes). Raises BadInput naming the flag."""
    if command.batch_size < 1:
        raise BadInput(f"--batch-size is {command.batch_size}: it must be at least 1")
    if command.processes is not None and command.processes < 1:
        raise BadInput(f"--processes is {command.processes}: it must be at least 1")
    if command.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device is cuda but there is no GPU: pass --device cpu")
    image = text = None
    if command.image_backbone != "features" and manifest.image == "encoded":
        if not command.image_weights:
            raise BadInput("--image-weights is empty: features of random weights are of no use, name some weights")
        image = (command.image_backbone, command.image_weights, command.image_size)
    if command.text_backbone != "features" and manifest.text == "utf8":
        if command.text_backbone != "sentence":
            raise BadInput(f"--text-backbone is '{command.text_backbone}': only sentence works without training")
        text = (command.text_backbone, command.text_weights, command.max_tokens)
    if image is None and text is None:
        raise BadInput(
            f"nothing to do: the images of {command.data} are {manifest.image} and its texts {manifest.text}; "
            "name an --image-backbone or a --text-backbone for what is not features yet"
        )
    device = "cuda" if command.device != "cpu" and torch.cuda.is_available() else "cpu"
    processes = command.processes
    if processes is None:
        processes = 1 if device == "cuda" else usable_cores()
    threads = max(1, usable_cores() // processes)
    options = Options(image, text, command.batch_size, command.dtype, device, threads, command.skip_bad)
    return options, processes


def _settings(made: Extractor) -> dict[str, Any]:
    """What decides the bytes of a feature shard beside its source; goes into its record and the manifest."""
    settings: dict[str, Any] = {"batch_size": made.options.batch_size, "dtype": made.options.dtype}
    for side, chosen, backbone, limit in (
        ("image", made.options.image, made.image, "image_size"),
        ("text", made.options.text, made.text, "max_tokens"),
    ):
        if chosen is not None and backbone is not None:
            name, weights, size = chosen
            shown = weights if weights.startswith(("package:", "hub")) else Path(weights).name
            settings[side] = {
                "backbone": name,
                "weights": shown,
                "weights_sha256": weights_sha256(backbone),
                limit: size,
                "dim": backbone.dim,
            }
    return settings


def _remove_foreign(output: Path, names: set[str], overwrite: bool) -> None:
    """Remove the tars that have no source in this data set. Raises BadInput rather than do that unasked."""
    foreign = sorted(path for path in output.glob("*.tar") if path.name not in names)
    if foreign and not overwrite:
        raise BadInput(
            f"{output} holds another data set ({foreign[0].name} has no source): "
            "name a new --output, or pass --overwrite to remove it"
        )
    for path in foreign:
        for other in (path, output / index_name(path.name), output / record_name(path.name)):
            other.unlink(missing_ok=True)


def write_features(command: FeaturesCommand) -> Manifest:
    """Write the feature shards of `command` and their manifest, which is returned. Raises BadInput."""
    data, output = command.data, command.output
    manifest = load_manifest(data)
    if output.resolve() == data.resolve():
        raise BadInput(f"--output {output} is the data set itself: name another folder")
    sources = [(split, shard) for split, shards in manifest.splits.items() for shard in shards]
    for _, shard in sources:
        if not (data / shard.name).is_file():
            raise BadInput(f"{data / shard.name} is in the manifest but not in the folder: restore it")
    options, processes = _options(command, manifest)
    for side, asked, stored in (
        ("images", command.image_backbone, manifest.image),
        ("texts", command.text_backbone, manifest.text),
    ):
        if asked != "features" and stored == "features":
            print(f"the {side} of {data} are features already: copied as they are")
    made = extractor(options)
    settings = _settings(made)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the output folder {output}: {error.strerror}") from None
    _remove_foreign(output, {shard.name for _, shard in sources}, command.overwrite)
    done: dict[str, tuple[ShardInfo | None, list[str]]] = {}
    for _, shard in sources:
        try:
            finished = _finished(output, shard, settings, command.skip_bad)
        except BadInput:
            if not command.overwrite:
                raise
            (output / shard.name).unlink()
            continue
        if finished is not None:
            done[shard.name] = finished
    for path in output.glob(".*.tmp"):
        path.unlink()

    todo = [shard for _, shard in sources if shard.name not in done]
    if todo:
        # Until the new manifest is written, the folder is not a data set.
        (output / MANIFEST_NAME).unlink(missing_ok=True)
        begun = time.monotonic()
        results = parallel_map(
            write_shard,
            [(options, data, output, shard, settings) for shard in todo],
            title="features",
            unit_counts=[shard.samples for shard in todo],
            processes=processes,
        )
        seconds = time.monotonic() - begun
        done |= {shard.name: result for shard, result in zip(todo, results, strict=True)}
        count = sum(shard.samples for shard in todo)
        print(f"{count} samples in {seconds:.0f} s, {count / seconds:.1f} samples/s")

    splits: dict[str, list[ShardInfo]] = {split: [] for split in manifest.splits}
    left_out: list[str] = []
    for split, shard in sources:
        info, messages = done[shard.name]
        left_out += messages
        if info is not None:
            splits[split].append(info)
    for split, infos in splits.items():
        if not infos and manifest.splits[split]:
            raise BadInput(f"split '{split}' of {data} has no samples: every one of it was bad")
    written = Manifest(
        name=manifest.name,
        label_kind=manifest.label_kind,
        classes=manifest.classes,
        splits=splits,
        image="features" if made.image is not None else manifest.image,
        image_dim=made.image.dim if made.image is not None else manifest.image_dim,
        text="features" if made.text is not None else manifest.text,
        text_dim=made.text.dim if made.text is not None else manifest.text_dim,
        attribution=manifest.attribution,
        details={"source": str(data), **settings, "left_out": len(left_out), "raw": manifest.details},
    )
    write_atomic(output / MANIFEST_NAME, written.to_json())
    print(f"wrote {output}" if todo else f"already written: {output}")
    print_sizes(written)
    if left_out:
        print(f"left out {len(left_out)} bad samples:")
        for message in left_out:
            print(f"  {message}")
    return written
