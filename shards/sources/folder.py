"""Class folders of images with a text file beside each.

    DIR/[SPLIT/]CLASS/NAME.jpg      the image (jpg, jpeg, png, webp)
    DIR/[SPLIT/]CLASS/NAME.txt      its texts, UTF-8, one a line

SPLIT is a name with a word for one: train, val or test (dev and validation are val). Images without a class folder make
pairs without labels, and so do the numbered folders that img2dataset writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import tyro

from cmgan_dist.data.folder import composed, say_hidden, walk_files
from cmgan_dist.data.sample import IMAGE_EXTENSIONS
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput, shown
from shards.pack import DrawCommand
from shards.pairs import RawPair, RawPairs, brief, make_key, missing_val, say_splits
from shards.partitions import Partitions, partitions_for
from shards.sources.class_names import check_classes, first_names, say_classes, say_missing
from shards.sources.files import PlainFile, check_names, check_unicode
from shards.split_words import SPLIT_WORD, say_named_splits, split_in

PART = re.compile(r"[0-9]{5}")
"""The name of a folder that img2dataset writes."""
Image = tuple[Path, str | None, str | None]
"""Its path, its split and its class, None for none."""


@dataclass(kw_only=True)
class FolderCommand(DrawCommand):
    """Pack a folder: [SPLIT/]CLASS/NAME.jpg with its texts, one a line, in NAME.txt.

    Without class folders the pairs have no labels; without split folders a hash of the path splits them,
    equal pictures and equal texts together."""

    input: tyro.conf.Positional[Path]
    """The folder."""
    split_folders: bool = True
    """Take folders that are named after splits as splits; without, they are classes as the others are."""
    name: str | None = None
    """Name of the data set (None: the folder's)."""
    attribution: str = ""
    """Source and licence, for the manifest."""

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the images of the folder. Raises BadInput when there are none or only some have a class, and when a
        folder cannot be read or named."""
        if not self.input.is_dir():
            raise BadInput(f"input folder {self.input} does not exist: name another")
        output = FileStore(self.output, "--output")
        folder = Path(output.path).resolve() if output.local else None
        if folder == self.input.resolve():
            raise BadInput(f"--output {self.output} is the input folder itself: name another folder")
        self.draw(())
        splits = _split_folders(self.input, folder) if self.split_folders else {}
        others, hidden = list[str](), list[str]()
        images, parts = _pictures(self.input, splits, others, hidden)
        hidden = [name for name in hidden if folder not in (self.input / name).resolve().parents]
        classes = sorted({class_name for _, _, class_name in images if class_name is not None})
        flat = next((path for path, _, class_name in images if class_name is None), None)
        if flat is not None and classes:
            raise BadInput(
                f"{flat} stands beside the class folder '{classes[0]}': move it into one, or give no image a class"
            )

        named = tuple(dict.fromkeys(splits.values()))
        draw = self.draw(named)
        name = self.name or self.input.resolve().name
        check_names("--name", name)
        check_classes("class folder", classes)
        check_unicode("--attribution", self.attribution)

        def raw_pairs() -> Iterator[RawPair]:
            for path, split, class_name in images:
                below = path.relative_to(self.input).with_suffix("").as_posix()
                key = make_key(below.encode("utf-8", "backslashreplace").decode())
                yield RawPair(
                    key=key,
                    split=split or "",
                    image=PlainFile(str(path.absolute())),
                    texts=PlainFile(str(path.absolute().with_suffix(".txt"))),
                    labels=() if class_name is None else (classes.index(class_name),),
                    where=shown(str(path)),
                )

        rows.partitions = partitions_for(len(images))
        rows.add_all(raw_pairs())
        return RawPairs(
            name=name,
            label_kind="single" if classes else "none",
            classes=classes,
            attribution=self.attribution,
            details={"source": "folder", **asdict(draw)},
            draw=draw,
            expected_splits=(*(named or ("train",)), *draw.splits),
            notes=[
                *_say_folders(self.input, list(splits), classes, parts, folder),
                *say_named_splits((split, Path(name)) for name, split in splits.items()),
                say_splits(named, draw),
                *_left_out(others),
                *say_hidden(hidden),
                *missing_val([*(named or ["train"]), *draw.splits]),
            ],
        )


def _folders(top: Path, output: Path | None) -> list[str]:
    """Return the names of the sub-folders, sorted, without `output` and what a Mac leaves in an archive."""
    found = (path for path in top.iterdir() if path.is_dir() and path.resolve() != output)
    return sorted(path.name for path in found if not path.name.startswith(".") and path.name != "__MACOSX")


def _split_folders(top: Path, output: Path | None) -> dict[str, str]:
    """Return the names of the sub-folders with their splits when they are named after splits, `output` and what a Mac
    leaves in an archive apart, else {}.

    They are when one is nothing but such a word, as train2017, or two have words of different splits. Raises BadInput
    at another one beside these."""
    folders = _folders(top, output)
    named = {name: split for name in folders if (split := split_in([name]))}
    if len(set(named.values())) < 2 and not any(map(_is_split_alone, named)):
        return {}
    stray = next((name for name in folders if name not in named), None)
    if stray is not None:
        raise BadInput(
            f"{top / stray} stands beside the split folders {brief(', '.join(named))}: move it away, or into one of "
            "them, or pass --no-split-folders where all are classes"
        )
    return named


def _is_split_alone(name: str) -> bool:
    """Return whether a folder's name is a word for a split, with digits at most."""
    return not re.search(r"[^\W\d_]", SPLIT_WORD.sub("", name))


def _pictures(top: Path, splits: dict[str, str], others: list[str], hidden: list[str]) -> tuple[list[Image], bool]:
    """Return what `_images` gives, and whether its folders are img2dataset's parts, which are no classes. Raises
    BadInput as it does, and where there are none."""
    images = list(_images(top, splits, others, hidden))
    if not images:
        raise BadInput(f"{top} holds no images ({', '.join(f'.{extension}' for extension in IMAGE_EXTENSIONS)})")
    parts = _parts_of_img2dataset(top, images, others)
    return [(path, split, None if parts else class_name) for path, split, class_name in images], parts


def _parts_of_img2dataset(top: Path, images: list[Image], others: list[str]) -> bool:
    """Return whether the class folders are parts that img2dataset numbers, with a JSON file beside each image."""
    if not all(class_name is not None and PART.fullmatch(class_name) for _, _, class_name in images):
        return False
    records = {name.removesuffix(".json") for name in others if name.endswith(".json")}
    return all(path.relative_to(top).with_suffix("").as_posix() in records for path, _, _ in images)


def _say_folders(top: Path, splits: list[str], classes: list[str], parts: bool, output: Path | None) -> list[str]:
    """Return a line that says what the labels are, with the first of their names, and one that names the folders of
    which no picture was taken."""
    if parts:
        return ["the folders are numbered parts that img2dataset wrote, no classes: no labels"]
    said = f"class folders are the labels, {say_classes(classes)[0]}" if classes else "no class folders: no labels"
    found = {composed(name) for split in splits or [""] for name in _folders(top / split, output)}
    lost = sorted(found - set(classes))
    what = "class folders" if classes else "folders"
    return [said, *say_missing(classes), *[f"{what} without a picture: {first_names(lost)}"] * bool(lost)]


def _left_out(others: list[str]) -> list[str]:
    """Return a line that says which files were left out, none where there are none."""
    if not others:
        return []
    return [
        f"{len(others)} files are no pictures and texts of a known kind and were left out, the first is {others[0]}"
    ]


def _images(top: Path, splits: dict[str, str], others: list[str], hidden: list[str]) -> Iterator[Image]:
    """Give the images in and below `top`, hidden files apart.

    `splits`: split folders. `others` gets the paths of files of other kinds, `hidden` those that are. Raises BadInput
    at a text without an image or of another ending, or an image beside the split folders."""
    files = [PurePosixPath(name) for name in walk_files(top, (*IMAGE_EXTENSIONS, "txt"), others, hidden)]
    images = [path for path in files if path.suffix.lower() != ".txt"]
    owners = {path.with_suffix("") for path in images}
    for path in files:
        beside = bool(splits) and len(path.parts) == 1
        if path.suffix.lower() == ".txt" and path.with_suffix("") not in owners and not beside:
            raise BadInput(f"{top / path} has no image of the same name: add it or move the text away")
        if path.suffix != ".txt" and path.suffix.lower() == ".txt" and path.with_suffix("") in owners:
            raise BadInput(f"{top / path} is taken for texts where its name ends in .txt: rename it so")
    for path in images:
        split, folders = None, path.parts[:-1]
        if splits:
            if not folders:
                raise BadInput(f"{top / path} stands beside the split folders: move it into one, or away")
            split, folders = splits[folders[0]], folders[1:]
        yield top / path, split, composed(folders[0]) if folders else None
