"""Ten thousand damaged samples: index, verify, features and training find the same ones bad, and none of them crashes,
hangs, or takes more memory than a sample may."""

from __future__ import annotations

import io
import json
import resource
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmgan_dist.data.batch import SampleDecoder
from cmgan_dist.data.index import index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import Manifest, load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadSample
from shards.scan import scan_shard
from tests.toy import npy, write_manifest, write_tar

SAMPLES = 10_000
A_SHARD = 500
MOST_MIB = 700
"""Growth of the process: one sample may take 512 MiB."""
MOST_SECONDS = 20
"""Of one sample, on a machine that others load too."""


def _picture(rng: np.random.Generator, kind: str) -> bytes:
    """A small picture; JPEGs in colours, grey or CMYK, progressive or not, PNGs with alpha and palettes too."""
    side = [int(each) for each in rng.integers(8, 90, 2)]
    pixels = np.kron(rng.integers(0, 255, (2, 2, 4)), np.ones((side[0], side[1], 1))).astype(np.uint8)
    modes = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "P", "L", "1"], "WEBP": ["RGB", "RGBA"]}[kind]
    image = Image.fromarray(pixels).convert(str(rng.choice(modes)))
    options = {"JPEG": {"progressive": bool(rng.random() < 0.3)}, "WEBP": {"lossless": bool(rng.random() < 0.3)}}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options.setdefault(kind, {})["exif"] = exif  # type: ignore[assignment]
    out = io.BytesIO()
    image.save(out, kind, **options.get(kind, {}))
    return out.getvalue()


def _sample(rng: np.random.Generator, features: bool) -> dict[str, bytes]:
    """The members of a good sample."""
    record: dict[str, object] = {"label": int(rng.integers(3))}
    if features:
        arrays = {"image.npy": rng.normal(size=8), "text.npy": rng.normal(size=(2, 6))}
        dtype = rng.choice(["<f4", "<f2", ">f4", "<f8"])
        members = {name: npy(array.astype(dtype)) for name, array in arrays.items()}
    else:
        kind = str(rng.choice(["JPEG", "PNG", "WEBP"]))
        members = {{"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]: _picture(rng, kind)}
        if rng.random() < 0.5:
            members["txt"] = "Grüße, a dog 你好".encode()
        else:
            record["texts"] = ["a dog", "Grüße"]
    return members | {"json": json.dumps(record, ensure_ascii=False).encode()}


def _damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes overwritten, flipped, cut off, cut out, inserted, or doubled."""
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    match int(rng.integers(7)):
        case 0:
            return data[:at] + rng.bytes(length) + data[at + length :]
        case 1:
            return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + length :]
        case 4:
            return data[:at] + rng.bytes(length) + data[at:]
        case 5:
            return data[:at] + data[at : at + length] * 3 + data[at + length :]
        case _:
            return data[:at] + b"\xff\xd9"


def _write(folder: Path, rng: np.random.Generator, features: bool) -> None:
    """Shards of SAMPLES / 2 samples, of which each has one damaged member."""
    for shard in range(SAMPLES // 2 // A_SHARD):
        members = []
        for i in range(A_SHARD):
            sample = _sample(rng, features)
            spoiled = str(rng.choice(list(sample)))
            sample[spoiled] = _damage(rng, sample[spoiled])
            members += [(f"{shard}-{i}.{extension}", data) for extension, data in sample.items()]
        write_tar(folder / f"train-{shard:03d}.tar", members)


def _manifest_of(folder: Path, features: bool) -> Manifest:
    """Write sidecars and a manifest that says what most samples are, and return it."""
    infos = []
    for path in sorted(folder.glob("*.tar")):
        scan = scan_shard(path, path.name)
        assert not scan.damage
        (folder / index_name(path.name)).write_bytes(scan.index.to_bytes())
        infos.append(scan.info)
    kinds = {"image": "features", "image_dim": 8, "text": "features", "text_dim": 6} if features else {}
    write_manifest(folder, {"train": infos}, label_kind="single", classes=list("abc"), **kinds)
    return load_manifest(folder)


def _by_training(folder: Path, augment: bool, size: int) -> dict[tuple[str, int], str]:
    """(shard, number) of a sample -> why a training run replaces it."""
    reader = ShardReader(str(folder), "train")
    decoder = SampleDecoder.of(reader.manifest, size, augment)
    bad: dict[tuple[str, int], str] = {}
    image, labels = decoder.empty(1)
    for shard, info in enumerate(reader.shards):
        for i in range(info.samples):
            began = time.process_time()
            try:
                decoder(reader.read(shard, i), info.name, i, image[0], labels[0])
            except BadSample as error:
                bad[info.name, i] = str(error)
            assert time.process_time() - began < MOST_SECONDS
    return bad


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True], ids=["raw", "features"])
def test_damaged_samples_are_judged_alike(tmp_path: Path, features: bool) -> None:
    warnings.simplefilter("ignore")  # of Pillow and NumPy, at damaged files
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _write(tmp_path, np.random.default_rng(features), features)
    manifest = _manifest_of(tmp_path, features)
    verified: dict[tuple[str, int], str] = {}
    indexed: dict[tuple[str, int], str] = {}
    for shard in manifest.splits["train"]:
        path = tmp_path / shard.name
        for found, judge in ((verified, Judge.of(manifest)), (indexed, None)):
            for i, facts in enumerate(scan_shard(path, shard.name, decode=True, judge=judge).samples):
                if fault := facts.fault or facts.label_fault:
                    found[shard.name, i] = fault
    unlike = {place for place in verified if place not in indexed}  # those of other sizes and labels than the others
    assert all("the manifest says" in verified[place] or "label" in verified[place] for place in unlike)
    assert indexed == {place: reason for place, reason in verified.items() if place not in unlike}
    trained = _by_training(tmp_path, augment=True, size=32)
    assert trained.keys() == verified.keys()
    assert all(verified[place] in reason for place, reason in trained.items())
    assert all(reason.isprintable() for reason in trained.values())
    assert _by_training(tmp_path, augment=False, size=65).keys() == trained.keys()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(f"{manifest.samples('train')} tried, {len(verified)} refused, the process grew by {grown} MiB")
    assert grown < MOST_MIB
    assert 0 < len(verified) < manifest.samples("train") == SAMPLES // 2
