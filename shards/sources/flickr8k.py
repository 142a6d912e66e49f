"""Flickr8k: 8,000 photographs with five English captions each, pairs without classes.

Reads a folder with images.tar, captions.tsv (image<TAB>caption) and split_train.txt, split_dev.txt, split_test.txt."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmgan_dist.errors import BadInput
from cmgan_dist.files import open_regular, read_bytes
from shards.pack import BuildCommand
from shards.pairs import FileSlice, RawPair, RawPairs, brief, lines_of, make_key
from shards.partitions import Partitions

ATTRIBUTION = (
    "Flickr8k: M. Hodosh, P. Young, J. Hockenmaier, Framing Image Description as a Ranking Task, JAIR 47 (2013). "
    "Distributed for research use, to be cited; the photographs are copyright of their Flickr owners. No licence."
)
SPLIT_FILES = {"train": "split_train.txt", "val": "split_dev.txt", "test": "split_test.txt"}


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a UTF-8 file that are not empty, behind their numbers. Raises BadInput when it is missing or
    not UTF-8."""
    try:
        lines = lines_of(read_bytes(path).decode("utf-8-sig"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: name the folder that holds it with --input") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): restore it") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_captions(path: Path) -> dict[str, list[str]]:
    """Return image -> its captions, in their order. Raises BadInput at a line that has no tab."""
    captions: dict[str, list[str]] = {}
    for number, line in read_lines(path):
        image, tab, caption = line.partition("\t")
        if not tab:
            raise BadInput(f"{path} line {number} has no tab ({brief(line)}): write the image, a tab and its caption")
        captions.setdefault(image.strip(), []).append(caption.strip())
    return captions


def read_splits(folder: Path) -> dict[str, str]:
    """Return image -> its split. Raises BadInput at an image that a list names twice, or two lists name."""
    split_of: dict[str, str] = {}
    for split, file in SPLIT_FILES.items():
        for number, name in ((number, line.strip()) for number, line in read_lines(folder / file)):
            if name in split_of:
                before = f"{SPLIT_FILES[split_of[name]]} names already" if split_of[name] != split else "it names above"
                raise BadInput(f"{folder / file} line {number} names {brief(name)}, which {before}: keep one of them")
            split_of[name] = split
    return split_of


@dataclass(kw_only=True)
class Flickr8kCommand(BuildCommand):
    """Pack Flickr8k: the original JPEG bytes with five captions each, in the published splits, without classes."""

    input: Path = Path("../shared/data/flickr8k")
    """Folder with images.tar, captions.tsv and split_*.txt."""

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the photographs of the published splits. Raises BadInput when a file or an image is missing,
        or a line of the lists is not what it should be."""
        archive = self.input / "images.tar"
        captions, split_of = read_captions(self.input / "captions.tsv"), read_splits(self.input)
        places = _image_places(archive)
        absent = [name for name in split_of if name not in places]
        if absent:
            raise BadInput(f"{archive} has no image {absent[0]} ({len(absent)} in all), which a split file names")

        def raw_pairs() -> Iterator[RawPair]:
            for name, split in split_of.items():
                texts = tuple(captions.get(name, ()))
                yield RawPair(make_key(Path(name).stem), split, places[name], texts, (), name)

        outside = len(places.keys() - split_of.keys())
        of_none = [name for name in captions if name not in places]
        notes = [f"{outside} images are in no published split and were left out"]
        if of_none:
            count = sum(len(captions[name]) for name in of_none)
            notes.append(f"{count} captions are of images that {archive} has not, the first of {brief(of_none[0])}")
        rows.add_all(raw_pairs())
        return RawPairs(
            name="flickr8k",
            label_kind="none",
            classes=[],
            attribution=ATTRIBUTION,
            details={"source": "flickr8k", "images_in_no_split": outside},
            expected_splits=("train", "val", "test"),
            notes=notes,
        )


def _image_places(archive: Path) -> dict[str, FileSlice]:
    """Return file name -> where its bytes lie in the archive. Raises BadInput when there is no whole tar, or
    a name twice."""
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile()]
    except FileNotFoundError:
        raise BadInput(f"{archive} does not exist: name the folder that holds it with --input") from None
    except tarfile.TarError as error:
        raise BadInput(f"{archive} is not a whole tar ({error})") from None
    except OSError as error:
        raise BadInput(f"{archive} cannot be read ({error.strerror}): restore it") from None
    places: dict[str, FileSlice] = {}
    for member in members:
        name = Path(member.name).name
        if name in places:
            raise BadInput(f"{archive} holds two files named {brief(name)}: keep one of them")
        places[name] = FileSlice(str(archive.absolute()), member.offset_data, member.size)
    return places
