"""The files of a data set that is checked, in a folder or at a URL, as they are now: nothing is taken from a cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cmgan_dist.data.cache import CachedStore, open_store
from cmgan_dist.data.folder import MOST_FILE_BYTES, read_file, walk_files
from cmgan_dist.data.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES, Manifest, load_manifest
from cmgan_dist.data.source import NotThere, public_url
from cmgan_dist.data.store import OBJECT_STORES, FileStore, LocalStore
from shards.output import PACKING_NAME


class DataFiles:
    """The files under one path or URL."""

    def __init__(self, data: str) -> None:
        """Raises BadInput when the protocol of a URL is unknown, or its package is missing."""
        store = open_store(data)
        self.data, self.place = data, public_url(data)
        self.folder = store.folder if isinstance(store, LocalStore) else Path()
        self.source = store.source if isinstance(store, CachedStore) else None
        """None for a folder."""
        self.kind = "folder" if self.source is None else "place"
        """What messages call where the files lie."""

    def manifest(self) -> Manifest:
        """Return the manifest. Raises BadInput when it is missing or wrong."""
        if self.source is None:
            return load_manifest(self.folder)
        data = self.source.read(MANIFEST_NAME, MOST_MANIFEST_BYTES)
        return Manifest.from_json(data, self.source.location(MANIFEST_NAME))

    def read(self, name: str) -> bytes | None:
        """Return a sidecar, None where there is none. Raises BadInput, or BadSample, when it cannot be read."""
        if self.source is None:
            return read_file(self.folder / name) if (self.folder / name).is_file() else None
        try:
            return self.source.read(name, MOST_FILE_BYTES)
        except NotThere:
            return None

    @contextmanager
    def local(self, name: str) -> Iterator[Path | None]:
        """Give the path of a file, None where there is none; of a URL, that of a copy for so long.

        Raises BadInput when it cannot be fetched."""
        if self.source is None:
            yield self.folder / name if (self.folder / name).is_file() else None
            return
        with TemporaryDirectory() as folder:
            path: Path | None = Path(folder) / "file"
            try:
                self.source.copy(name, Path(folder) / "file")
            except NotThere:
                path = None
            yield path

    def names(self, endings: Collection[str]) -> list[str]:
        """Return the names of the files with these endings here and below, hidden folders apart; of http, which lists
        nothing, none. Raises BadInput when they cannot be listed."""
        if self.source is None:
            return walk_files(self.folder, endings)
        names = FileStore(self.data, "DATA").names() if self.source.protocol in OBJECT_STORES else []
        return [name for name in names if name.endswith(tuple(f".{e}" for e in endings)) and "/." not in f"/{name}"]

    def leftovers(self) -> list[str]:
        """Return the names of what is left of a run that did not end. Raises BadInput when that cannot be found out."""
        if self.source is not None:
            return [] if self.read(PACKING_NAME) is None else [PACKING_NAME]
        found = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.tmp")]
        return sorted([*found, *[PACKING_NAME] * (self.folder / PACKING_NAME).exists()])
