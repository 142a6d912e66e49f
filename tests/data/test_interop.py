"""Our shards read by plain webdataset, training from shards that others wrote, and tars that mean harm."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.index import INDEX_VERSION, ShardIndex, index_name
from cmgan_dist.data.manifest import ShardInfo, load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import parse_array, parse_sample
from cmgan_dist.data.stream import Stream
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput, BadSample
from shards.__main__ import main
from shards.verify import verify
from tests.services import forked
from tests.toy import environment, index_tar, jpeg, make_features, make_raw, npy, write_manifest, write_tar

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 512


def shards(*args: object) -> int | None:
    """``python -m shards ARGS`` in this process."""
    return main([str(arg) for arg in args])


def train(data: Path, run: Path, *extra: str) -> list[dict[str, object]]:
    """A short run by the command that a user would type, on raw pictures and texts; the lines of metrics.jsonl."""
    command = ["launchers/train.py", "--preset", "smoke", "--data", str(data), "--output", str(run)]
    command += ["model.image.name=resnet18", "model.image.image_size=32", "model.text.name=cnn"]
    command += ["stream.global_batch=8", "train.epochs=1", "train.log_every=1", "train.tracker=none", *extra]
    env = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = forked.run([*command, "train.threads=1", "train.report=false"], env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_trained(lines: list[dict[str, object]], steps: int) -> None:
    """`steps` updates with finite losses and no bad sample, then a validation."""
    kinds = [line["kind"] for line in lines]
    assert kinds == ["train"] * steps + ["val"]
    for line in lines[:-1]:
        losses = [value for name, value in line.items() if name.startswith("loss/")]
        assert losses
        assert all(isinstance(value, float) for value in losses), line  # null stands for NaN
        assert line["bad_samples"] == 0
    assert isinstance(lines[-1]["score"], float)


# ---------------------------------------------------------------------------------------------- read by others


def ours(folder: Path, split: str) -> list[tuple[str, bytes, list[str], tuple[int, ...]]]:
    reader = ShardReader(str(folder), split)
    return [(s.key, s.image, list(s.texts), s.labels) for s in reader]  # type: ignore[misc]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def plain_webdataset(folder: Path, split: str) -> list[dict[str, object]]:
    urls = [str(folder / shard.name) for shard in load_manifest(folder).splits[split]]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))


def test_plain_webdataset_reads_shards_with_several_captions(tmp_path: Path) -> None:
    folder = make_raw(tmp_path / "raw")
    for split, count in (("train", 40), ("val", 16), ("test", 16)):
        theirs, mine = plain_webdataset(folder, split), ours(folder, split)
        assert len(theirs) == len(mine) == count
        for sample, (key, image, texts, labels) in zip(theirs, mine, strict=True):
            assert sample["__key__"] == key
            assert sample["json"] == {"texts": texts, "label": labels[0]}
            np.testing.assert_array_equal(np.asarray(sample["jpg"]), pixels(image))


@pytest.mark.process
def test_plain_webdataset_reads_what_build_packed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 4)):
        for i in range(count):
            place = tmp_path / "source" / split / ("cat" if i % 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{split}.{i}.jpg").write_bytes(jpeg(rng))
            (place / f"{split}.{i}.txt").write_text(f"eine Katze, 猫 {split} {i}", encoding="utf-8")
    output = tmp_path / "packed"
    command = ["-m", "shards", "build", "folder", str(tmp_path / "source"), "--output", str(output)]
    done = forked.run([*command, "--processes", "1", "--shard-samples", "5"], environment())
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(output)
    assert [shard.samples for shard in manifest.splits["train"]] == [5, 5, 3]
    seen = set()
    for split in ("train", "val"):
        theirs, mine = plain_webdataset(output, split), ours(output, split)
        assert [sample["__key__"] for sample in theirs] == [key for key, _, _, _ in mine]
        for sample, (_, image, texts, labels) in zip(theirs, mine, strict=True):
            assert [sample["txt"]] == texts
            assert sample["json"]["label"] == labels[0]  # type: ignore[index]
            np.testing.assert_array_equal(np.asarray(sample["jpg"]), pixels(image))
            seen.add(sample["txt"])
    assert seen == {f"eine Katze, 猫 {split} {i}" for split, count in (("train", 13), ("val", 4)) for i in range(count)}


# ---------------------------------------------------------------------------------------------- written by others


@pytest.fixture(scope="module")
def by_shard_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``webdataset.ShardWriter`` writes: it encodes the pictures, texts and records itself."""
    folder = tmp_path_factory.mktemp("writer")
    rng = np.random.default_rng(2)
    for split, count in (("train", 28), ("val", 8)):
        with webdataset.ShardWriter(f"{folder}/{split}-%04d.tar", maxcount=12, verbose=0) as sink:
            for i in range(count):
                picture = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                record = {"label": i % 3, "source": "made here"}
                sink.write({"__key__": f"{split}/{i:05d}", "jpg": picture, "txt": f"picture no {i}", "json": record})
    return folder


def img2dataset(folder: Path, *, count: int = 12) -> Path:
    """The layout of img2dataset (output_format=webdataset), one folder per split: numbered tars of KEY.jpg, .txt and
    .json in its order, and beside each tar a parquet file of the records, failed downloads too, and statistics."""
    rng = np.random.default_rng(4)
    for split, tars in (("train", 2), ("val", 1)):
        (folder / split).mkdir(parents=True)
        for t in range(tars):
            members, records = [], []
            for i in range(count + 1):
                key = f"{t:05d}{i:04d}"
                record = {
                    "caption": f"a photo of thing {i % 5}",
                    "url": f"http://example.org/{split}/{key}.jpg",
                    "key": key,
                    "status": "failed_to_download" if i == 3 else "success",
                    "error_message": "HTTP Error 404: Not Found" if i == 3 else None,
                    "width": 48,
                    "height": 40,
                    "original_width": 48,
                    "original_height": 40,
                    "exif": "{}",
                    "sha256": f"{i:064x}",
                }
                records.append(record)
                if record["status"] == "success":
                    members += [(f"{key}.jpg", jpeg(rng)), (f"{key}.txt", str(record["caption"]).encode())]
                    members += [(f"{key}.json", json.dumps(record, indent=4).encode())]
            write_tar(folder / split / f"{t:05d}.tar", members)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / split / f"{t:05d}.parquet")
            stats = {"count": count + 1, "successes": count, "failed_to_download": 1, "status_dict": {"success": count}}
            (folder / split / f"{t:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def test_shard_writer_s_output_is_indexed_and_read_like_webdataset_reads_it(by_shard_writer: Path) -> None:
    shards("index", by_shard_writer, "--processes", 1, "--overwrite")
    manifest = load_manifest(by_shard_writer)
    assert {split: [s.samples for s in infos] for split, infos in manifest.splits.items()} == {
        "train": [12, 12, 4],
        "val": [8],
    }
    assert (manifest.label_kind, manifest.classes) == ("single", ["0", "1", "2"])
    assert verify(by_shard_writer, processes=1).problems == []
    for split in ("train", "val"):
        theirs, mine = plain_webdataset(by_shard_writer, split), ours(by_shard_writer, split)
        for sample, (key, image, texts, labels) in zip(theirs, mine, strict=True):
            assert (sample["__key__"], [sample["txt"]], sample["json"]["label"]) == (key, texts, labels[0])  # type: ignore[index]
            np.testing.assert_array_equal(np.asarray(sample["jpg"]), pixels(image))


@pytest.mark.process
def test_training_from_shard_writer_s_output(by_shard_writer: Path, tmp_path: Path) -> None:
    done = forked.run(["-m", "shards", "index", str(by_shard_writer), "--overwrite"], environment())
    assert done.returncode == 0, done.stderr
    assert_trained(train(by_shard_writer, tmp_path / "run"), steps=28 // 8)


@pytest.mark.process
def test_training_from_img2dataset_s_output(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion")
    shards("index", folder, "--processes", 1)
    manifest = load_manifest(folder)
    assert {split: [(s.name, s.samples) for s in infos] for split, infos in manifest.splits.items()} == {
        "train": [("train/00000.tar", 12), ("train/00001.tar", 12)],
        "val": [("val/00000.tar", 12)],
    }
    assert (manifest.label_kind, manifest.classes) == ("none", [])
    found = ours(folder, "train")
    assert {key for key, _, _, _ in found} == {f"{t:05d}{i:04d}" for t in range(2) for i in range(13) if i != 3}
    assert all(texts == [f"a photo of thing {int(key[5:]) % 5}"] for key, _, texts, _ in found)
    assert_trained(train(folder, tmp_path / "run", "loss.classification=0"), steps=24 // 8)


# ---------------------------------------------------------------------------------------------- tars that mean harm


def header(name: str, size: int = 0, kind: bytes = b"0", size_field: bytes | None = None, link: str = "") -> bytes:
    """A tar header with a right checksum, whatever its size field says."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size_field is not None:
        block[124:136] = size_field.ljust(12, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, **fields: object) -> bytes:
    return header(name, len(data), **fields) + data + b"\0" * (-len(data) % BLOCK)  # type: ignore[arg-type]


def base256(number: int) -> bytes:
    return bytes([0x80]) + number.to_bytes(11, "big")


SIZES = {
    "8 EiB": base256(1 << 63),
    "2 ** 87": base256(1 << 87),
    "4 EiB": base256(1 << 62),
    "1 TiB": base256(1 << 40),
    "8 GiB in octal": b"77777777777",
    "-1 in base 256": b"\xff" * 12,
    "-512 in base 256": b"\xff" * 10 + b"\xfe\x00",
    "-512 in octal": b"-0000001000",
    "no number": b"0o17_0",
}
PAX = {
    "length 0": b"0 path=x.txt\n",
    "length 0 behind a good one": b"14 path=x.txt\n0 size=3\n",
    "negative length": b"-14 path=x.txt\n",
    "length beyond the header": b"99999999999999999999 path=x.txt\n",
    "length of itself alone": b"3 path=x.txt\n",
    "no length": b"path=x.txt\n",
    "no space": b"14",
    "8 EiB": b"28 size=9223372036854775808\n",
    "negative size": b"12 size=-10\n",
    "size is no number": b"13 size=many\n",
}
HOSTILE = {f"size: {name}": header("b.jpg", size_field=field) + b"x" * BLOCK for name, field in SIZES.items()}
HOSTILE |= {f"pax: {name}": member("pax", data, kind=b"x") + member("b.jpg", b"x" * 100) for name, data in PAX.items()}


@contextmanager
def bounded(seconds: float = 5, mib: int = 64) -> Iterator[None]:
    """Fails a block that runs too long or allocates too much."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib << 20, "allocated what a header claimed"
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_a_bad_sample_and_is_not_believed(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.jpg", b"one") + member("a.txt", b"two") + HOSTILE[case] + b"\0" * 1024)
    for opened in (open(path, "rb"), io.BytesIO(path.read_bytes())):  # noqa: SIM115 - closed below
        with opened as file, bounded(), pytest.raises(BadSample, match=r"a\.tar .*byte \d+") as error:
            list(iter_samples(file, "a.tar"))
        assert "\n" not in str(error.value)


def spoil_sample(data: Path, replacement: bytes, sample: int = 4) -> None:
    """Overwrite the beginning of a sample in its place, as a damaged disk or a foe would: its index stays."""
    path = data / "train-000000.tar"
    index = ShardIndex.from_bytes((data / index_name(path.name)).read_bytes(), path.name)
    content = bytearray(path.read_bytes())
    at = int(index.offsets[sample])
    assert len(replacement) <= index.offsets[sample + 1] - at
    content[at : at + len(replacement)] = replacement
    path.write_bytes(content)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_in_a_shard_is_replaced_by_the_stream(case: str, tmp_path: Path) -> None:
    data = make_raw(tmp_path / "data", counts={"train": 16})
    spoil_sample(data, HOSTILE[case])
    stream = Stream(str(data), StreamConfig(global_batch=8, max_bad_share=0.5), seed=0, image_size=16)
    with bounded():
        batches = list(islice(stream.batches(0), 2))
    assert {key for b in batches for key in b.keys} == {f"train{i}" for i in range(16) if i != 4}
    lines = [line for b in batches for line in b.bad]
    assert lines
    assert all(line.startswith("train-000000.tar ") and "\n" not in line for line in lines)


@pytest.mark.parametrize("case", ["size: 8 EiB", "size: 1 TiB", "size: -512 in octal", "pax: length 0", "pax: 8 EiB"])
def test_a_hostile_header_ends_indexing_as_one_sentence(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(member("a.jpg", b"one") + member("a.txt", b"two") + HOSTILE[case] + b"\0" * 1024)
    with bounded(), pytest.raises(BadInput, match=r"a\.tar .*--skip-bad") as error:
        shards("index", tmp_path, "--processes", 1)
    assert "\n" not in str(error.value)


EVIL_NAMES = [
    "../../evil",
    "/tmp/cmgan-evil",
    "a/../../evil",
    "C:\\evil",
    "evil\n2",
    "\u202eevil",
    ".hidden",
    "x" * 300,
]


def hostile_names(folder: Path) -> Path:
    """Well-formed samples with such names, two plain ones between."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True)
    members = []
    for key in ["plain1", *EVIL_NAMES, "plain2"]:
        members += [(f"{key}.jpg", jpeg(rng)), (f"{key}.txt", b"a text"), (f"{key}.json", b'{"label": 0}')]
    write_tar(folder / "train-000000.tar", members)
    return folder


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_names_that_lead_out_of_the_folder_lead_nowhere(tmp_path: Path) -> None:
    """A member's name is a key and no path: nothing is written or read by it."""
    data = hostile_names(tmp_path / "deep" / "er" / "data")
    before = tree(tmp_path)
    shards("index", data, "--processes", 1)
    names = [s.key for s in ShardReader(str(data), "train")]
    stream = Stream(str(data), StreamConfig(global_batch=2, max_bad_share=1), seed=0, image_size=16)
    drawn = {key for batch in islice(stream.batches(0), 10) for key in batch.keys}
    assert {"plain1", "plain2", "../../evil", "/tmp/cmgan-evil"} <= set(names)
    assert {"plain1", "plain2"} <= drawn
    assert tree(tmp_path) - before == {"deep/er/data/manifest.json", "deep/er/data/train-000000.index.npz"}
    assert not Path("/tmp/cmgan-evil.jpg").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_devices_and_folders_are_not_followed(kind: bytes, tmp_path: Path) -> None:
    """A picture that is a link to one outside is no picture."""
    rng = np.random.default_rng(6)
    (tmp_path / "secret.jpg").write_bytes(jpeg(rng))
    data = tmp_path / "data"
    data.mkdir()
    content = b""
    for i in range(12):
        picture = header(f"{i}.jpg", kind=kind, link=str(tmp_path / "secret.jpg"))
        content += member(f"{i}.jpg", jpeg(rng)) if i != 5 else picture
        content += member(f"{i}.txt", b"a text") + member(f"{i}.json", b'{"label": 0}')
    (data / "train-000000.tar").write_bytes(content + b"\0" * 1024)
    shards("index", data, "--processes", 1)
    stream = Stream(str(data), StreamConfig(global_batch=4, max_bad_share=0.5), seed=0, image_size=16)
    batches = list(islice(stream.batches(0), 3))
    assert {key for b in batches for key in b.keys} == {str(i) for i in range(12) if i != 5}
    lines = {line for b in batches for line in b.bad}
    assert lines == {"train-000000.tar sample 5: has no image: expected a .jpg, .png, .webp or .image.npy member"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_link_has_no_data_whatever_its_size_says(kind: bytes, tmp_path: Path) -> None:
    """As Python's tarfile, and so plain webdataset, reads it: the next header follows at once."""
    path = tmp_path / "a.tar"
    link = header("a.jpg", kind=kind, size_field=b"00000001000", link="/etc/passwd")
    path.write_bytes(link + member("a.txt", b"two") + member("b.txt", b"three") + b"\0" * 1024)
    with tarfile.open(path) as tar:
        theirs = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}  # type: ignore[union-attr]
    with open(path, "rb") as file:
        mine = {f"{key}.{e}": data for key, _, members in iter_samples(file, "a.tar") for e, data in members.items()}
    assert mine == theirs == {"a.txt": b"two", "b.txt": b"three"}


ARRAY = npy(np.zeros(4, np.float32))


def with_shape(shape: str) -> bytes:
    head = ARRAY[10:128].decode().replace("(4,)", shape).rstrip()
    return ARRAY[:10] + head.ljust(117).encode() + b"\n" + ARRAY[128:]


@pytest.mark.parametrize(
    "data",
    [
        with_shape(f"({10**30},)"),
        with_shape("(4611686018427387904,)"),
        with_shape("(1099511627776,)"),
        with_shape("(-1,)"),
        with_shape("(True,)"),
        with_shape("(4,"),
        with_shape("'"),
        ARRAY[:10] + b"(" * 118 + ARRAY[128:],
        ARRAY[:10] + b"  a\n b".ljust(117) + b"\n" + ARRAY[128:],
        ARRAY.replace(b"'descr'", b"b'escr'"),
        ARRAY.replace(b"'<f4'", b"'|O' "),
        ARRAY[:6] + b"\x09" + ARRAY[7:],
    ],
)
def test_hostile_arrays_are_bad_samples(data: bytes) -> None:
    with bounded(), pytest.raises(BadSample, match=r"k\.npy"):
        parse_array(data, "k.npy")


@pytest.mark.parametrize(
    "record",
    [b"[" * 100_000, b'{"texts":' * 50_000, b"9" * 100_000, b'{"label": 1e999}', b"\xff"],
    ids=["lists", "objects", "digits", "infinite label", "not UTF-8"],
)
def test_hostile_records_are_bad_samples(record: bytes) -> None:
    with bounded(), pytest.raises(BadSample):
        parse_sample("k", {"jpg": b"", "txt": b"a", "json": record})


def _random_damage(rng: np.random.Generator, tar: bytes) -> bytes:
    """A tar with a few bytes changed; headers get right checksums again, so that what they say is looked at."""
    data = bytearray(tar)
    headers = [at for at in range(0, len(tar), BLOCK) if tar[at + 257 : at + 262] == b"ustar"]
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5:
            at = int(rng.choice(headers))
            data[at + int(rng.choice([0, 1, 124, 125, 130, 134, 135, 156, 257, 345]))] = int(
                rng.choice(list(b"\0 07-_Lxg\x80\xff"))
            )
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
        else:
            data[int(rng.integers(len(tar)))] = int(rng.choice([*b" 0-=(", rng.integers(256)]))
    return bytes(data)


def test_random_damage_is_a_bad_sample_and_nothing_else(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("a.image.npy", ARRAY),
            ("a.txt", b"text"),
            ("b" * 150 + ".json", b'{"texts": ["x"], "label": 1}'),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]  # a fraction makes a pax header
            tar.addfile(info, io.BytesIO(data))
    rng, outcomes = np.random.default_rng(0), {"good": 0, "bad": 0}
    with bounded(60):
        for _ in range(3000):
            try:
                for key, _, members in iter_samples(io.BytesIO(_random_damage(rng, out.getvalue())), "a.tar"):
                    parse_sample(key, members)
                outcomes["good"] += 1
            except BadSample:
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_random_damage_in_a_header_is_a_bad_sample_under_its_index(tmp_path: Path) -> None:
    """Whatever the header says instead, and though its checksum is right."""
    data = make_raw(tmp_path / "data", counts={"train": 6})
    path = data / "train-000000.tar"
    content = path.read_bytes()
    stored = dict(raw_of(data))
    assert len(stored) == 6
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = _random_damage(rng, content)
        path.write_bytes(damaged)
        reader = ShardReader(str(data), "train")
        headers = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
        whole = []
        for i, (key, members) in enumerate(stored.items()):
            start, stop = reader.index(0).offsets[i : i + 2]
            if all(damaged[at : at + BLOCK] == content[at : at + BLOCK] for at in headers if start <= at < stop):
                found, others = reader.raw(0, i)
                assert (found, list(others)) == (key, list(members))
                whole.append(key)
            else:
                with pytest.raises(BadSample, match=r"train-000000\.tar .*byte") as error:
                    reader.raw(0, i)
                assert "\n" not in str(error.value)
        assert [key for key, _ in raw_of(data)] == whole
        reader.close()


def raw_of(data: Path) -> list[tuple[str, dict[str, bytes]]]:
    reader = ShardReader(str(data), "train")
    found = [(key, {e: bytes(m) for e, m in members.items()}) for _, key, members in reader.raw_samples()]
    reader.close()
    return found


def test_a_shard_in_another_s_place_has_no_usable_sample(tmp_path: Path) -> None:
    """Its samples have the same sizes, so that the other index cuts them well: only the names are not those."""
    data = make_features(tmp_path / "data", splits={"train": [12, 12]}, label_kind="none")
    one, two = (data / f"train-{i:06d}.tar" for i in range(2))
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    reader = ShardReader(str(data), "train")
    for shard in range(2):
        for i in range(12):
            with pytest.raises(BadSample, match=rf"train-00000{shard}\.tar sample {i}: .*other headers than those"):
                reader.read(shard, i)
    assert list(reader) == []
    stream = Stream(str(data), StreamConfig(global_batch=8, max_bad_share=1), seed=0)
    with pytest.raises(BadInput, match="no usable sample left in a window"):
        next(stream.batches(0))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_raw_reading_gives_each_member_that_the_walk_finds(form: int, tmp_path: Path) -> None:
    """One by one and in pieces; samples larger than a piece, plain ones and such as only the walk finds."""
    rng = np.random.default_rng(2)
    with tarfile.open(tmp_path / "train.tar", "w", format=form) as tar:
        for i in range(40):
            key = f"{'d' * 60}/{'k' * 60}{i}" if i % 7 == 3 else f"{i:05d}"
            for extension, size in (("jpg", 600_000 if i % 13 == 5 else 20_000), ("json", 0), ("exif", 700 * (i % 3))):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = 2 if extension == "json" else size
                tar.addfile(info, io.BytesIO(b"{}" if extension == "json" else rng.bytes(size)))
            if i % 11 == 4:
                tar.addfile(tarfile.TarInfo("README"))
    write_manifest(tmp_path, {"train": [index_tar(tmp_path / "train.tar")]})
    reader = ShardReader(str(tmp_path), "train")
    with open(tmp_path / "train.tar", "rb") as file:
        walked = [(key, members) for key, _, members in iter_samples(file, "train.tar")]
    assert raw_of(tmp_path) == walked
    assert [reader.raw(0, i) for i in range(len(walked))] == walked
    end = int(reader.index(0).offsets[15]) - 600  # in the last member of the sample before
    (tmp_path / "train.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:end])
    assert raw_of(tmp_path) == walked[:14]


def vars_of(index: ShardIndex) -> dict[str, np.ndarray]:
    return {each.name: getattr(index, each.name) for each in fields(index)}


def test_a_sidecar_that_claims_too_much_is_not_believed(tmp_path: Path) -> None:
    """Offsets beyond the shard, or running backwards: a sentence, and nothing is allocated for them."""
    data = make_raw(tmp_path / "data", counts={"train": 8})
    path = data / index_name("train-000000.tar")
    good = ShardIndex.from_bytes(path.read_bytes(), path.name)
    for place, value in ((8, 1 << 62), (3, 1 << 40), (3, -512), (4, 0)):
        offsets = good.offsets.copy()
        offsets[place] = value
        with open(path, "wb") as file:
            np.savez(file, version=INDEX_VERSION, **{**vars_of(good), "offsets": offsets})
        reader = ShardReader(str(data), "train")
        with bounded(), pytest.raises(BadInput, match=r"train-000000\.index\.npz .*shards index") as error:
            reader.read(0, 2)
        assert "\n" not in str(error.value)


def test_toy_shards_are_like_those_of_index(tmp_path: Path) -> None:
    """The helper that most tests make their data with agrees with the product's own indexing."""
    data = make_raw(tmp_path / "data")
    told: dict[str, list[ShardInfo]] = load_manifest(data).splits
    shards("index", data, "--processes", 1, "--overwrite")
    assert load_manifest(data).splits == told
