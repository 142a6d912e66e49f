"""Class folders of images with a text file beside each.

    DIR/[SPLIT/]CLASS/NAME.jpg      the image (jpg, jpeg, png, webp)
    DIR/[SPLIT/]CLASS/NAME.txt      its texts, UTF-8, one a line

SPLIT is train, val or test (dev and validation are val). Images without a class folder make pairs without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from cmgan_dist.data.sample import IMAGE_EXTENSIONS
from cmgan_dist.errors import BadInput
from shards.pack import BuildCommand
from shards.pairs import FileBytes, RawPair, RawPairs, check_shares, hash_split, make_key
from shards.scan import SPLIT_ALIASES


@dataclass(kw_only=True)
class FolderCommand(BuildCommand):
    """Pack a folder: [SPLIT/]CLASS/NAME.jpg with its texts, one a line, in NAME.txt.

    Without class folders the pairs have no labels; without split folders a hash of the path splits them."""

    input: tyro.conf.Positional[Path]
    """The folder."""
    name: str | None = None
    """Name of the data set (None: the folder's)."""
    attribution: str = ""
    """Source and licence, for the manifest."""
    val: float = 0.1
    """Share of pairs in val, when there are no split folders."""
    test: float = 0.1
    """Share of pairs in test, when there are no split folders."""

    def pairs(self) -> RawPairs:
        """List the images of the folder. Raises BadInput when there are none or only some have a class."""
        if not self.input.is_dir():
            raise BadInput(f"input folder {self.input} does not exist")
        check_shares(self.val, self.test)
        tops: list[tuple[Path, str | None]] = [*_split_folders(self.input)] or [(self.input, None)]
        images = [(path, split, class_name) for top, split in tops for path, class_name in _images(top)]
        if not images:
            kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
            raise BadInput(f"{self.input} holds no images ({kinds})")
        classes = sorted({class_name for _, _, class_name in images if class_name is not None})
        flat = next((path for path, _, class_name in images if class_name is None), None)
        if flat is not None and classes:
            raise BadInput(
                f"{flat} stands beside the class folder '{classes[0]}': move it into one, or give no image a class"
            )

        def raw_pairs() -> Iterator[RawPair]:
            for path, split, class_name in images:
                key = make_key(path.relative_to(self.input).with_suffix("").as_posix())
                yield RawPair(
                    key=key,
                    split=split or hash_split(key, self.val, self.test),
                    image=FileBytes(path),
                    texts=FileBytes(path.with_suffix(".txt")),
                    labels=() if class_name is None else (classes.index(class_name),),
                    where=str(path),
                )

        hashed = [name for name, share in (("val", self.val), ("test", self.test)) if share]
        return RawPairs(
            name=self.name or self.input.resolve().name,
            label_kind="single" if classes else "none",
            classes=classes,
            pairs=raw_pairs(),
            attribution=self.attribution,
            details={"source": "folder", "val": self.val, "test": self.test},
            expected_splits=tuple(split for _, split in tops if split) or ("train", *hashed),
        )


def _split_folders(top: Path) -> list[tuple[Path, str]]:
    """Return the sub-folders with their splits when every one is named after a split, else []."""
    folders = sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = [(path, SPLIT_ALIASES[path.name.lower()]) for path in folders if path.name.lower() in SPLIT_ALIASES]
    return named if len(named) == len(folders) else []


def _images(top: Path) -> Iterator[tuple[Path, str | None]]:
    """Give (image, its class or None) under `top`, hidden files apart. Raises BadInput at a text without an image."""
    files = sorted(path for path in top.rglob("*") if path.is_file())
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(top).parts)]
    images = [path for path in visible if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
    owners = {path.with_suffix("") for path in images}
    for path in visible:
        if path.suffix == ".txt" and path.with_suffix("") not in owners:
            raise BadInput(f"{path} has no image of the same name: add it or move the text away")
    for path in images:
        parts = path.relative_to(top).parts
        yield path, parts[0] if len(parts) > 1 else None
