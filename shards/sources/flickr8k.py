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
from shards.pairs import FileSlice, RawPair, RawPairs, make_key
from shards.partitions import Partitions

ATTRIBUTION = (
    "Flickr8k: M. Hodosh, P. Young, J. Hockenmaier, Framing Image Description as a Ranking Task, JAIR 47 (2013). "
    "Distributed for research use, to be cited; the photographs are copyright of their Flickr owners. No licence."
)
SPLIT_FILES = {"train": "split_train.txt", "val": "split_dev.txt", "test": "split_test.txt"}


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not empty. Raises BadInput when it is missing or not UTF-8."""
    try:
        return [line for line in read_bytes(path).decode().splitlines() if line.strip()]
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: name the folder that holds it with --input") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): restore it") from None


@dataclass(kw_only=True)
class Flickr8kCommand(BuildCommand):
    """Pack Flickr8k: the original JPEG bytes with five captions each, in the published splits, without classes."""

    input: Path = Path("../shared/data/flickr8k")
    """Folder with images.tar, captions.tsv and split_*.txt."""

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the photographs of the published splits. Raises BadInput when a file or an image is missing."""
        archive = self.input / "images.tar"
        captions: dict[str, list[str]] = {}
        for line in read_lines(self.input / "captions.tsv"):
            image, _, caption = line.partition("\t")
            captions.setdefault(image, []).append(caption.strip())
        split_of = {
            name: split for split, file in SPLIT_FILES.items() for name in map(str.strip, read_lines(self.input / file))
        }
        places = _image_places(archive)
        absent = [name for name in split_of if name not in places]
        if absent:
            raise BadInput(f"{archive} has no image {absent[0]} ({len(absent)} in all), which a split file names")

        def raw_pairs() -> Iterator[RawPair]:
            for name, split in split_of.items():
                texts = tuple(captions.get(name, ()))
                yield RawPair(make_key(Path(name).stem), split, places[name], texts, (), name)

        outside = len(places.keys() - split_of.keys())
        rows.add_all(raw_pairs())
        return RawPairs(
            name="flickr8k",
            label_kind="none",
            classes=[],
            attribution=ATTRIBUTION,
            details={"source": "flickr8k", "images_in_no_split": outside},
            expected_splits=("train", "val", "test"),
            notes=[f"{outside} images are in no published split and were left out"],
        )


def _image_places(archive: Path) -> dict[str, FileSlice]:
    """Return file name -> where its bytes lie in the archive. Raises BadInput when there is no whole tar."""
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile()]
    except FileNotFoundError:
        raise BadInput(f"{archive} does not exist: name the folder that holds it with --input") from None
    except tarfile.TarError as error:
        raise BadInput(f"{archive} is not a whole tar ({error})") from None
    except OSError as error:
        raise BadInput(f"{archive} cannot be read ({error.strerror}): restore it") from None
    return {Path(m.name).name: FileSlice(str(archive.absolute()), m.offset_data, m.size) for m in members}
