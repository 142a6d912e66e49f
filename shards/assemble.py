"""The end of every command that makes a data set: its manifest, written last, and what is printed of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmgan_dist.data.index import ShardIndex, index_name
from cmgan_dist.data.manifest import LabelKind, Manifest, ShardInfo
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput, reasons_of, shown
from shards.sources.class_names import first_names

MOST_UNFILLED = 5
"""Classes without a sample that a line names."""


def assemble(
    *,
    name: str,
    label_kind: LabelKind,
    classes: list[str],
    labels: str = "numbers",
    splits: Mapping[str, Sequence[ShardInfo | None]],
    image_dim: int | None,
    text_dim: int | None,
    attribution: str,
    details: dict[str, Any],
    left_out: Sequence[str] = (),
) -> Manifest:
    """Return the manifest of the shards in `splits`; None stands for a shard without a good sample, which is not there.

    `labels`: what those of samples are, ``numbers`` of classes or ``names``. `image_dim` and `text_dim` are the sizes
    of features, None for encoded images and for texts; `left_out` has a line for each bad pair.
    Raises BadInput when not one shard of a split has a sample, or a name has characters that no terminal can show."""
    written = {split: [shard for shard in shards if shard is not None] for split, shards in splits.items()}
    for split, shards in splits.items():
        if shards and not written[split]:
            why = f" ({reasons_of(left_out)})" if left_out else ""
            raise BadInput(f"split '{split}' of {name} has no samples: every pair of it was bad{why}: mend some")
    manifest = Manifest(
        name=name,
        label_kind=label_kind,
        classes=classes,
        labels=labels,
        splits=written,
        image="encoded" if image_dim is None else "features",
        image_dim=image_dim,
        text="utf8" if text_dim is None else "features",
        text_dim=text_dim,
        attribution=attribution,
        details=details,
    )
    try:
        manifest.check()
    except ValueError as error:
        raise BadInput(f"{shown(name)} cannot be described, as {shown(str(error))}: rename it") from None
    return manifest


def say_unfilled(store: FileStore, manifest: Manifest, left_out: Sequence[str]) -> list[str]:
    """Return a line that names classes without a sample in any split, where pairs were left out; none where all have
    one. Sidecars are read until each class was met. Raises BadInput when one cannot be read."""
    missing = {*range(len(manifest.classes))} if left_out else set()
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        if not missing:
            return []
        name = index_name(shard.name)
        missing -= {*ShardIndex.from_bytes(store.read(name), store.location(name)).label_values.tolist()}
    names = first_names([manifest.classes[number] for number in sorted(missing)], MOST_UNFILLED)
    return [f"classes without a sample, since pairs were left out: {names}"] if missing else []


def print_summary(
    headline: str, manifest: Manifest, *, notes: Sequence[str] = (), left_out: Sequence[str] = ()
) -> None:
    """Print what a command did, the sizes of the splits and the notes; what was left out goes to stderr."""
    print(shown(headline))
    print_sizes(manifest)
    for note in notes:
        print(shown(note))
    if left_out:
        print(f"left out {len(left_out)} bad pairs:", file=sys.stderr)
        for message in left_out:
            print(f"  {shown(message)}", file=sys.stderr)


def print_sizes(manifest: Manifest) -> None:
    """Print a table of the samples, the shards and the MB of each split."""
    table = Table("split", "samples", "shards", "MB", title=escape(manifest.name))
    for split, shards in manifest.splits.items():
        size = sum(shard.bytes for shard in shards) / 1e6
        table.add_row(escape(split), str(manifest.samples(split)), str(len(shards)), f"{size:.1f}")
    Console().print(table)
