"""Where a data set is written, a folder or a URL: whether something else lies there, and room made for it.

.packing         what is being written there, until all of it is: the fingerprint of a plan
manifest.json    written last: it makes a data set of the shards"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from cmgan_dist.data.cache import own_cache
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest
from cmgan_dist.data.output import clear_leftovers
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.lock import lock_name, owning
from shards.plan_files import remove_plans

PACKING_NAME = ".packing"
"""Marks an output that is not complete; holds the fingerprint of what is being packed."""
LOCK = "build"
"""What is owned of an output while a data set is written there."""
OUTPUT_PATTERN = re.compile(r".+-\d{6,}\.(tar|index\.npz|build\.json)")
"""Every file that packing leaves in its output, the manifest apart."""


def existing_manifest(output: FileStore) -> Manifest | None:
    """Return the manifest that is there, None where there is none that is whole. Raises BadInput when it cannot be
    read."""
    try:
        data = output.read(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BadInput):
        return Manifest.from_json(data, output.location(MANIFEST_NAME))
    return None


def being_packed(output: FileStore) -> str:
    """Return the fingerprint of what is being written there, "" for nothing. Raises BadInput when it cannot be read."""
    try:
        return output.read(PACKING_NAME).decode(errors="replace")
    except FileNotFoundError:
        return ""


def prepare_output(
    output: FileStore, fingerprint: str, overwrite: bool, keep: Collection[str] = (), done: Collection[str] = ()
) -> None:
    """Make room for the plan with this fingerprint, and the folder, until `finish_output`.

    `keep`: files that stay where the output holds this plan, or one that was not finished. `done`: shards that are this
    plan's by their records, also where the manifest that says so is lost. Raises BadInput rather than
    replace another data set unasked, and when nothing can be written there."""
    if output.local:
        try:
            Path(output.path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write into the output folder {output.path}: {error.strerror}") from None
    interrupted, names, old = being_packed(output), output.own_names(), existing_manifest(output)
    occupied = MANIFEST_NAME in names or (not interrupted and any(n.endswith(".tar") and n not in done for n in names))
    same = fingerprint in (interrupted, old.details.get("fingerprint") if old else "")
    if occupied and not same and not overwrite:
        raise refuse(output)
    output.write(PACKING_NAME, fingerprint)
    # The manifest goes first: until the new one is written, this is not a data set.
    for name in [MANIFEST_NAME, *sorted(name for name in names if OUTPUT_PATTERN.fullmatch(name))]:
        if name in names and name not in keep:
            output.remove(name)
    clear_leftovers(output)


def refuse(output: FileStore) -> BadInput:
    """Return what is said of an output that holds another data set."""
    place = public_url(output.url)
    another = "folder" if output.local else "place"
    return BadInput(f"{place} holds another data set: name a new {another}, or pass --overwrite to replace it")


def finish_output(output: FileStore, manifest: Manifest) -> None:
    """Write the manifest, which makes the output a data set: the shards and sidecars must be there.

    Raises BadInput when it cannot be written."""
    clear_leftovers(output)  # of workers that were lost meanwhile
    output.write(MANIFEST_NAME, manifest.to_json())
    output.remove(PACKING_NAME)


# ---------------------------------------------------------------------------------------------- a folder to work in


def find_work(output: FileStore, work: Path | None, cluster: str) -> Path:
    """Return the folder of this machine for locks and plans while `output` is written: that itself, where it is one.

    `work`: what the user named, None for a place in the cache; outputs do not share it. `cluster`: of Ray, "" for none.
    Raises BadInput where `work` is needless, or needed."""
    place = public_url(output.url)
    if output.local:
        if work is not None:
            raise BadInput(f"--work is for an --output that is a URL, which {place} is not: leave it away")
        return Path(output.path)
    if work is None and cluster:
        raise BadInput(f"--ray with --output {place} needs a folder for the plan that all nodes see: name it by --work")
    own = hashlib.sha256(output.url.encode()).hexdigest()[:16]
    return (work.absolute() if work is not None else own_cache("plans")) / own


def leave_work(output: FileStore, work: Path, *, keep: bool, is_new: bool) -> None:
    """Remove the plans in `work` that nobody reads any more, and the folder where it is empty and was made.

    `keep`: until the data set is finished, as other tasks need them. Raises BadInput when `output` cannot be asked."""
    in_use = [lock for lock in work.glob(lock_name(f"{LOCK}*")) if not _is_left(lock)]
    if not in_use and (not keep or output.size(MANIFEST_NAME) is not None):
        remove_plans(work)
    if is_new or not output.local:
        with contextlib.suppress(OSError):  # there is something in it, or nothing could be made
            work.rmdir()


def _is_left(lock: Path) -> bool:
    """Return whether nobody holds a lock any more, as its owner was killed, and remove it if so."""
    prefix, suffix = lock_name("*").split("*")
    try:
        with owning(lock.parent, lock.name.removeprefix(prefix).removesuffix(suffix)):
            return True
    except BadInput:  # it is held, or cannot be asked
        return False
