"""Captions in COCO's format (Lin et al., ECCV 2014; Chen et al., arXiv 1504.00325): ``captions_train2017.json``.

A file is ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``, as pycocotools reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tyro

from cmgan_dist.data.folder import is_unicode
from cmgan_dist.data.manifest import natural_splits
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json_once, read_bytes
from shards.pack import DrawCommand
from shards.pairs import RawPair, RawPairs, brief, make_key, missing_val, say_splits
from shards.partitions import Partitions, partitions_for
from shards.sources.class_names import count_missing, say_missing_texts
from shards.sources.files import PlainFile, check_names, plain_path
from shards.split_words import say_named_splits, split_in

ATTRIBUTION = (
    "MS COCO captions: X. Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv "
    "1504.00325 (2015), annotations CC BY 4.0; the photographs are copyright of their Flickr owners."
)


@dataclass(kw_only=True)
class CocoCommand(DrawCommand):
    """Pack pictures with the captions of COCO's annotation files, without classes.

    A file whose name has a word for train, val (dev, validation) or test is that split, as captions_val2017.json; the
    pictures of other files are split by a hash."""

    input: tyro.conf.Positional[tuple[Path, ...]]
    """Annotation files, such as captions_train2017.json captions_val2017.json."""
    images: Path
    """Folder of the pictures, or of folders that are named like the files: train2017 for captions_train2017.json."""
    name: str = "coco"
    """Name of the data set."""
    attribution: str = ATTRIBUTION
    """Source and licence, for the manifest."""

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the captioned pictures. Raises BadInput naming the file and what is wrong in it."""
        if not self.input:
            raise BadInput("name one annotation file or more, such as captions_train2017.json")
        self.draw(())
        check_names("--name", self.name)
        files = [_File(path, self.images) for path in self.input]
        named = natural_splits(file.split or "train" for file in files) if any(file.split for file in files) else []
        draw = self.draw(named)
        without = sum(len(file.without) for file in files)

        def raw_pairs() -> Iterator[RawPair]:
            for file in files:
                for name, captions in file.captions.items():
                    plain = PurePosixPath(plain_path(str(file.folder.absolute()), name))
                    key = make_key(f"{file.folder.name}/{plain.with_suffix('').as_posix()}")
                    image = PlainFile(str(file.folder.absolute() / name))
                    yield RawPair(key, file.split, image, tuple(captions), (), f"{name} of {file.path}")

        rows.partitions = partitions_for(sum(len(file.captions) for file in files))
        rows.add_all(raw_pairs())
        return RawPairs(
            name=self.name,
            label_kind="none",
            classes=[],
            attribution=self.attribution,
            details={"source": "coco", **asdict(draw), "without_caption": without},
            draw=draw,
            expected_splits=(*(named or ["train"]), *draw.splits),
            notes=[
                f"{sum(len(file.captions) for file in files)} pictures with captions, no labels",
                *say_named_splits((file.split, file.path) for file in files),
                say_splits(named, draw),
                *say_missing_texts(sum(count_missing(each) for file in files for each in file.captions.values())),
                *[f"{without} pictures have no caption and were left out"] * bool(without),
                *missing_val([*(named or ["train"]), *draw.splits]),
            ],
        )


class _File:
    """An annotation file that was read: pictures with their captions, and where they lie."""

    def __init__(self, path: Path, images: Path) -> None:
        """Raises BadInput when it cannot be read, is of another format, or its pictures are not there."""
        self.path = path
        self.split = split_in([path.stem])
        record = _read(path)
        self.captions: dict[str, list[str]] = {}
        by_id: dict[Any, str] = {}
        for number, image in enumerate(_list_in(record, "images", path)):
            name = image.get("file_name")
            if not isinstance(name, str) or not name or image.get("id") is None:
                raise BadInput(f"{path}: image {number} has no id or no file_name: mend or remove it")
            _check_id(image["id"], f"{path}: image {number}", "id")
            if not Path(name).name or "\0" in name or not is_unicode(name):
                raise BadInput(f"{path}: image {number} has the file_name {brief(name)}, which no file has: mend it")
            if by_id.setdefault(image["id"], name) != name or name in self.captions:
                raise BadInput(f"{path}: image {number}, {brief(name)}, stands twice: remove one")
            self.captions[name] = []
        for number, annotation in enumerate(_list_in(record, "annotations", path)):
            number_of, caption = annotation.get("image_id"), annotation.get("caption")
            if number_of is None:
                raise BadInput(f"{path}: annotation {number} has no image_id: mend or remove it")
            _check_id(number_of, f"{path}: annotation {number}", "image_id")
            owner = by_id.get(number_of)
            if owner is None:
                raise BadInput(
                    f"{path}: annotation {number} is of image {brief(repr(number_of))}, which is not in it: add that "
                    "image, or remove the annotation"
                )
            if not isinstance(caption, str) or not caption.strip():
                raise BadInput(f"{path}: annotation {number} of {brief(owner)} has no caption: give captions_*.json")
            self.captions[owner].append(caption.strip())
        self.without = [name for name, captions in self.captions.items() if not captions]
        for name in self.without:
            del self.captions[name]
        if not self.captions:
            raise BadInput(f"{path} has no captioned picture: give another file")
        self.folder = self._folder(images)

    def _folder(self, images: Path) -> Path:
        first = next(iter(self.captions))
        choices = [images, images / self.path.stem.partition("_")[2], images / self.split]
        for folder in choices:
            if (folder / first).is_file():
                return folder
        places = " or ".join(str(folder) for folder in dict.fromkeys(choices))
        raise BadInput(f"--images {images}: picture {brief(first)} of {self.path} is not in {places}")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = parse_json_once(read_bytes(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): name an annotation file") from None
    except ValueError as error:
        raise BadInput(f"{path} is not whole JSON ({brief(str(error), 200)}): get it again") from None
    if not isinstance(record, dict):
        raise BadInput(f"{path} is not in COCO's format: expected an object with images and annotations")
    return record


def _check_id(value: Any, where: str, field: str) -> None:
    """Raise BadInput unless an id is a whole number or a text: Python takes true and 1.0 for 1."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadInput(
            f"{where} has the {field} {brief(json.dumps(value))}: write ids of images as whole numbers or texts, in "
            "images and annotations alike"
        )


def _list_in(record: dict[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise BadInput(f"{path} has no list '{name}' of objects: give a file in COCO's format, captions_*.json")
    return value
