"""An output that several processes fill, in a folder or at a URL: who owns it, and what of it is done.

Beside each file that is made lies its record (`jobs.ledger`), which is written last: on an object store, where nothing
is renamed, it is what makes a file count. A folder is locked, so that no two processes do one task's work at once; an
object store knows no locks: two that are started on one output make the same bytes under the same names, so that one
only repeats what the other has done."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import ledger
from cmgan_dist.jobs.lock import owning
from cmgan_dist.jobs.staging import remove_leftovers


def owning_output(store: FileStore, name: str) -> contextlib.AbstractContextManager[None]:
    """Own an output for the work `name` until the end, where it is a folder.

    Raises BadInput when another process owns it, or nothing can be written there."""
    store.check_writable()
    return owning(Path(store.path), name) if store.local else contextlib.nullcontext()


def clear_leftovers(store: FileStore) -> None:
    """Remove what killed processes of this host left unfinished; an object store shows nothing of such.

    Raises BadInput when it cannot be removed."""
    if store.local:
        try:
            remove_leftovers(Path(store.path))
        except OSError as error:
            raise BadInput(f"{store.flag} {store.url}: leftovers cannot be removed ({error}): remove them") from None


def read_record(store: FileStore, name: str) -> ledger.Record | None:
    """Return a record, None when there is none or it is no record. Raises BadInput when it cannot be read."""
    try:
        return ledger.parse(store.read(name))
    except FileNotFoundError:
        return None


def write_record(store: FileStore, name: str, record: ledger.Record) -> None:
    """Write a record, in one step. Raises BadInput when it cannot be written."""
    store.write(name, ledger.text_of(record))


def abandon_record(store: FileStore, name: str, file: str) -> None:
    """Remove the record of a job that failed before its `file` was there; beside a file, it says whose that is.

    A record that is finished, because another process ended the job, stays. Raises BadInput when that cannot be
    done."""
    record = read_record(store, name)
    if (record is None or not record.finished) and store.size(file) is None:
        store.remove(name)


def is_whole(store: FileStore, written: dict[str, object]) -> bool:
    """Return whether a file that a record tells of (`ledger.WRITTEN`) is there, the same to the byte.

    Raises BadInput when it cannot be read."""
    name = str(written["name"])
    return store.size(name) == written["bytes"] and store.sha256(name) == written["sha256"]


def is_done(store: FileStore, record: ledger.Record) -> bool:
    """Return whether the job ended and what it wrote is there, the same to the byte.

    Raises BadInput when a file cannot be read."""
    return record.finished and all(is_whole(store, written) for written in record.files)
