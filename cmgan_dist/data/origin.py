"""Which data set another was made from: where it lies, and by what it is known again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cmgan_dist.config.fields import DATA_SEPARATOR
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest
from cmgan_dist.data.source import public_url
from cmgan_dist.errors import BadInput, shown
from cmgan_dist.jobs.machine import absolute

log = logging.getLogger(__name__)

SOURCE, SOURCE_SHA256 = "source", "source_sha256"
"""Where a manifest's details have the place of the data set that it was made from, and its `sha256_of_data`."""


def absolute_data(data: str) -> str:
    """Return a config's data, folders and URLs, as it is called from any folder."""
    return DATA_SEPARATOR.join(map(absolute, data.split(DATA_SEPARATOR)))


def fingerprint_of(splits: Iterable[Sequence[ShardInfo]]) -> str:
    """Return a SHA-256 of the checksums of the shards of splits: which data it is, wherever that lies."""
    shards = [[[s.name, s.samples, s.sha256] for s in split] for split in splits]
    return hashlib.sha256(repr(shards).encode()).hexdigest()


def sha256_of_data(manifest: Manifest) -> str:
    """Return by what a whole data set is known again: its shards in the order of their names, whatever its splits."""
    shards = [shard for split in manifest.splits.values() for shard in split]
    return fingerprint_of([sorted(shards, key=lambda shard: shard.name)])


def origin_of(data: str, manifest: Manifest) -> dict[str, str]:
    """Return what the details of a data set say of the one at `data` that it was made from."""
    return {SOURCE: public_url(absolute(data)), SOURCE_SHA256: sha256_of_data(manifest)}


def check_same(place: str, manifest: Manifest, sha256: str, made: str, flag: str) -> None:
    """Raises BadInput unless the data set at `place` is the one with this `sha256_of_data`.

    `made`: what was made from it, and `flag`: by what its raw shards can be named, for the message."""
    if sha256_of_data(manifest) != sha256:
        raise BadInput(
            f"{public_url(place)} holds another data set now than the one that {made} was made from (shards with other "
            f"checksums): restore that one, or name its raw shards by {flag}"
        )


def find_origin(place: str, details: Mapping[str, object], flag: str) -> str:
    """Return the folder of the raw shards that features were made from, "" where it was never told, or, as the log
    says, is not there any more, or is a URL.

    `place`: where the features lie. Features of features lead to the raw shards of the first. Raises BadInput, naming
    `flag`, when another data set lies in that folder."""
    source, sha256 = details.get(SOURCE), details.get(SOURCE_SHA256)
    if not isinstance(source, str) or not (os.path.isabs(source) or "://" in source):
        return ""
    if "://" in source or not (Path(source) / MANIFEST_NAME).is_file():
        why = "is a URL, which is not read unasked" if "://" in source else "is not there any more"
        log.warning(
            "%s was made from %s, which %s, so its pictures are not shown: name the raw shards by %s",
            public_url(place), shown(source), why, flag,
        )  # fmt: skip
        return ""
    if not isinstance(sha256, str):
        log.warning(
            "%s does not say which data set of %s it was made from, so no pictures are taken from there: name it by %s",
            public_url(place), shown(source), flag,
        )  # fmt: skip
        return ""
    manifest = load_manifest(Path(source))
    check_same(shown(source), manifest, sha256, public_url(place), flag)
    return find_origin(source, manifest.details, flag) if manifest.image == "features" else source
