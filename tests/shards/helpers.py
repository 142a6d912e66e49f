"""Small folders, tables and tars, and the data sets that commands make of them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import Manifest, load_manifest
from cmgan_dist.data.sample import parse_sample
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.files import write_atomic
from shards.__main__ import main
from shards.scan import scan_shard

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["ein Käfer", "红色的花", "قطة صغيرة", "жёлтый дом", "tail 🐕 wag"]


def picture(number: int, size: int = 24, kind: str = "PNG") -> bytes:
    """Encoded image that differs with its number."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size, size)).save(out, kind)
    return out.getvalue()


def fill(folder: Path, names: list[str], text: str = "a {}") -> Path:
    """Write NAME.png and NAME.txt for each name; the pictures are distinct."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(picture(zlib.crc32(name.encode())))
        path.with_suffix(".txt").write_text(text.format(path.name), encoding="utf-8")
    return folder


def run(*args: object) -> int | None:
    return main([str(arg) for arg in args])


def built(raw: Path, output: Path, *args: object) -> Manifest:
    run("build", "folder", raw, "--output", output, "--processes", 1, "--shard-samples", 8, *args)
    return load_manifest(output)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder: Path, split: str = "train") -> dict[str, tuple[object, tuple[int, ...]]]:
    """Key -> (texts, labels) of a split, by the schema's own reader."""
    found = {}
    for shard in load_manifest(folder).shards(split):
        with open(folder / shard.name, "rb") as file:
            for key, _, members in iter_samples(file, shard.name):
                sample = parse_sample(key, members)
                found[key] = sample.texts, sample.labels
    return found


def rewrite(path: Path, change: dict[str, bytes | None], extra: dict[str, bytes] | None = None) -> None:
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
    fill(folder, [f"img/{i}" for i in range(10)])
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


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tarfile.open(path, "w").close()
    rewrite(path, {}, members)


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
        write_tar(folder / f"{s:05d}.tar", members)
        (folder / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{s:05d}_stats.json").write_text("{}")
    return folder
