"""Print what a data set holds and draw some of it: classes, sizes, caption lengths, a picture grid."""

from __future__ import annotations

import contextlib
import hashlib
import io
import textwrap
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmgan_dist.data.cache import kept_store
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import Manifest, ShardInfo
from cmgan_dist.data.reader import ShardReader, open_data_set
from cmgan_dist.data.sample import Sample
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import LocalStore
from cmgan_dist.errors import BadInput, BadSample, shards_command, shown
from cmgan_dist.files import write_atomic
from cmgan_dist.jobs.local import parallel_map
from shards.assemble import print_sizes
from shards.scan import SampleFacts, ShardScan, scan_file, scan_shard

GRID_SIDE = 224
"""Side of a picture in the grid, in pixels: the square in its centre."""

CJK = ("Han", "Hiragana", "Katakana", "Katakana Or Hiragana", "Hangul", "Bopomofo")
ONLY_SERIF = ("Tibetan", "Tangut", "Khitan Small Script", "Makasar", "Dogra", "Toto", "Nyiakeng Puachue Hmong")
NOTO_NAMES = {"Nko": "NKo", "Phags Pa": "PhagsPa", "Signwriting": "SignWriting"}
"""Scripts of Unicode, and how the fonts of the Noto family are named after them."""
MOST_CELLS = 400
"""Pictures in the largest grid."""


@dataclass
class StatsCommand:
    """Print classes, sizes and caption lengths of each split, and draw a grid of pictures with their texts."""

    data: tyro.conf.Positional[str]
    """Folder or URL (http, s3, gs) with manifest.json and tars."""
    picture: Path | None = None
    """Where the grid is written (None: DATA/stats.png, of a URL stats.png here)."""
    rows: int = 4
    """Rows of the grid."""
    columns: int = 6
    """Columns of the grid."""
    processes: int | None = None
    """Processes that read shards (None: one a core)."""

    def run(self) -> None:
        """Print the tables and draw the grid. Raises BadInput when the data set or a flag is wrong."""
        if self.rows < 1 or self.columns < 1:
            raise BadInput("--rows and --columns must be at least 1")
        if self.rows * self.columns > MOST_CELLS:
            raise BadInput(
                f"--rows {self.rows} and --columns {self.columns} are more than {MOST_CELLS} pictures: give fewer"
            )
        store, manifest = open_data_set(self.data)
        facts, bad = read_facts(self.data, manifest, self.processes)
        print_sizes(manifest)
        if bad:
            print(f"{bad}: {shards_command('verify', public_url(self.data))} lists them")
        console = Console()
        if manifest.classes:
            console.print(class_table(manifest, facts))
        console.print(length_table(facts))
        if manifest.attribution:
            console.print(shown(manifest.attribution), style="dim", highlight=False, markup=False)
        if manifest.image == "features":
            print(f"no picture grid: the images are features of size {manifest.image_dim}")
            return
        picture = self.picture or (store.folder if isinstance(store, LocalStore) else Path()) / "stats.png"
        missing = draw_grid(self.data, manifest, self.rows, self.columns, picture)
        print(f"wrote {picture}")
        if missing:
            print(describe_missing(missing))


def _scan(data: str, shard: ShardInfo, decode: bool, judge: Judge) -> ShardScan:
    """Scan a shard; one at a URL comes through the cache. Raises BadInput when it cannot be read."""
    store = kept_store(data)
    if isinstance(store, LocalStore):
        return scan_shard(store.folder / shard.name, shard.name, decode, judge)
    with store.file(shard) as file:
        return scan_file(file, shard.name, decode, judge)


def read_facts(data: str, manifest: Manifest, processes: int | None) -> tuple[dict[str, list[SampleFacts]], str]:
    """Return split -> facts of its usable samples, and a line on the others, '' where there are none.

    Raises BadInput when a shard is missing or damaged."""
    listed = [(split, shard) for split, shards in manifest.splits.items() for shard in shards]
    tasks = [(data, shard, manifest.image == "encoded", Judge.of(manifest)) for _, shard in listed]
    facts: dict[str, list[SampleFacts]] = {split: [] for split in manifest.splits}
    scans = parallel_map(_scan, tasks, title="reading", processes=processes)
    for (split, _), scan in zip(listed, scans, strict=True):
        if scan.damage:
            raise BadInput(f"{scan.damage}: {shards_command('verify', public_url(data))} says what else is wrong")
        facts[split] += [one for one in scan.samples if not one.fault]
    bad = [one for scan in scans for one in scan.samples if one.fault]
    if not bad:
        return facts, ""
    count = sum(len(scan.samples) for scan in scans)
    found = f"the first: {shown(bad[0].key)}, {shown(bad[0].fault)}"
    return facts, f"{len(bad)} of {count} samples cannot be used and are left out ({found})"


def class_table(manifest: Manifest, facts: dict[str, list[SampleFacts]]) -> Table:
    """Return a table of the samples of each class in each split; a sample counts in each of its classes."""
    table = Table("class", *map(escape, facts), "all", title="samples a class")
    counts = {split: Counter(label for one in found for label in one.labels) for split, found in facts.items()}
    for label, name in enumerate(manifest.classes):
        numbers = [counts[split][label] for split in facts]
        table.add_row(escape(shown(name)), *map(str, numbers), str(sum(numbers)))
    return table


def length_table(facts: dict[str, list[SampleFacts]]) -> Table:
    """Return a table of the smallest, the median and the largest of what is measured in each split."""
    table = Table("", *map(escape, facts), title="smallest / median / largest")
    measures: dict[str, Any] = {
        "captions an image": lambda one: [len(one.caption_lengths)] if one.caption_lengths else [],
        "words a caption": lambda one: [words for _, words in one.caption_lengths],
        "characters a caption": lambda one: [characters for characters, _ in one.caption_lengths],
        "image width": lambda one: [one.size[0]] if one.size else [],
        "image height": lambda one: [one.size[1]] if one.size else [],
        "image features": lambda one: [one.image_dim] if one.image_dim else [],
        "text features": lambda one: [one.text_dim] if one.text_dim else [],
    }
    for title, measure in measures.items():
        cells = []
        for found in facts.values():
            values = [value for one in found for value in measure(one)]
            cells.append(f"{min(values)} / {np.median(values):g} / {max(values)}" if values else "")
        if any(cells):
            table.add_row(title, *cells)
    return table


def choose_samples(data: str, manifest: Manifest, count: int) -> list[tuple[str, Sample]]:
    """Return about `count` (split, sample) for the grid, the same ones on every call, the classes in turn.

    Raises BadInput when a sidecar is missing or not its shard's."""
    opened = (kept_store(data), manifest)
    readers = {split: ShardReader(data, split, opened=opened) for split in manifest.splits if manifest.samples(split)}
    places = []
    for split, reader in readers.items():
        for number, shard in enumerate(reader.shards):
            index = reader.index(number)
            for i in range(len(index)):
                order = hashlib.sha256(f"{shard.name} {i}".encode()).digest()
                places.append((order, index.labels(i)[:1], split, (number, i)))
    places.sort(key=lambda place: place[0])
    seen: Counter[tuple[int, ...]] = Counter()
    turns = []
    for place in places:
        turns.append((seen[place[1]], place[1], place))
        seen[place[1]] += 1
    turns.sort(key=lambda turn: turn[:2])
    chosen = []
    for _, _, (_, _, split, at) in turns[:count]:
        with contextlib.suppress(BadSample):  # verify names it; the grid goes on without it
            sample = readers[split].read(*at)
            if isinstance(sample.image, bytes):
                from cmgan_dist.data.image import check_image  # torch takes seconds to import, and --help waits

                check_image(sample.image)
            chosen.append((split, sample))
    return chosen


def fonts_for(text: str) -> tuple[list[str], list[str]]:
    """Return font families that together have the text's characters, and the characters that no font has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    default = font_manager.findfont("DejaVu Sans")
    families = ["DejaVu Sans"]
    missing = {ord(c) for c in text if c.isprintable()} - FT2Font(default).get_charmap().keys()
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if not missing:
            break
        # matplotlib's font of last resort has a box for every character.
        if entry.style != "normal" or entry.name in families or entry.name.startswith("Last Resort"):
            continue
        covered = missing & FT2Font(entry.fname).get_charmap().keys()
        if covered:
            families.append(entry.name)
            missing -= covered
    return families, sorted(map(chr, missing))


def describe_missing(characters: list[str]) -> str:
    """Return a line that says which characters are drawn as boxes, and which font of each script has them."""
    by_font: dict[str, str] = {}
    for character in characters:
        by_font[_font_of(character)] = by_font.get(_font_of(character), "") + character
    named = [f"{font} for {shown(own[:20])}{'…' * (len(own) > 20)}" for font, own in sorted(by_font.items())]
    return f"no installed font has {len(characters)} characters, drawn as boxes: install {', '.join(named)}"


def _font_of(character: str) -> str:
    """Return the font of the Noto family that has a character, by its script in Unicode."""
    from fontTools import unicodedata as scripts

    script = scripts.script_name(scripts.script(character))
    if script in CJK:
        return "Noto Sans CJK"
    if script not in ("Common", "Inherited", "Unknown"):
        return f"Noto {'Serif' if script in ONLY_SERIF else 'Sans'} {NOTO_NAMES.get(script, script)}"
    emoji = ord(character) >= 0x1F000 and unicodedata.category(character) in ("So", "Sk")
    return "Noto Emoji" if emoji else "Noto Sans Symbols 2"


def draw_grid(data: str, manifest: Manifest, rows: int, columns: int, picture: Path) -> list[str]:
    """Write a PNG of rows x columns pictures with their first text; returns the characters that no font has.

    Raises BadInput when the picture cannot be written or a sidecar is missing."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = choose_samples(data, manifest, rows * columns)
    columns = max(1, min(columns, len(samples)))
    rows = max(1, min(rows, -(-len(samples) // columns)))  # no more cells than pictures fill
    captions = [_caption(manifest, split, sample) for split, sample in samples]
    families, missing = fonts_for("".join(captions))
    with rc_context({"font.family": families, "font.size": 7}):
        figure = Figure(figsize=(1.9 * columns, 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, (_, sample), caption in zip(axes, samples, captions, strict=False):
            if isinstance(sample.image, bytes):
                from cmgan_dist.data.image import decode_image

                axis.imshow(decode_image(sample.image, GRID_SIDE)[..., :3])
            axis.set_title(caption, parse_math=False)
        figure.suptitle(f"{manifest.name}: {sum(map(manifest.samples, manifest.splits))} pairs", parse_math=False)
        out = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the caller names them in one line
            FigureCanvasAgg(figure).print_png(out)
        try:
            write_atomic(picture, out.getvalue())
        except OSError as error:
            raise BadInput(f"cannot write the picture {picture}: {error.strerror}") from None
    return missing


def _caption(manifest: Manifest, split: str, sample: Sample) -> str:
    """Return the classes or the split in brackets, and below the first text in at most three short lines."""
    classes = ", ".join(manifest.classes[i] for i in sample.labels if i < len(manifest.classes))
    text = sample.texts[0] if isinstance(sample.texts, list) else f"text features {sample.texts.shape}"
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text) > len(text) / 4
    return "\n".join([f"[{classes or split}]", *textwrap.wrap(text, 14 if wide else 28, max_lines=3, placeholder=" …")])
