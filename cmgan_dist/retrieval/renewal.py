"""An index that is served and changes on disk: noticed at the next request, and opened anew for it."""

from __future__ import annotations

import logging
from pathlib import Path

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.answers import Searcher
from cmgan_dist.retrieval.gates import Busy
from cmgan_dist.retrieval.index import Index
from cmgan_dist.retrieval.index_files import MANIFEST_NAME
from cmgan_dist.retrieval.pictures import pictures_by_source

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int] | None
"""Inode, bytes and time of index.json, which each change replaces; None where there is none."""


class Renewal:
    """Knows of which state of an index's folder the index is that is open."""

    def __init__(self, folder: Path, data: str = "") -> None:
        """To be made before the index is opened. `data`: as of `pictures_by_source`."""
        self.folder, self.data = folder, data
        self._opened = self._told = self._stamp()

    def _stamp(self) -> Stamp:
        try:
            found = (self.folder / MANIFEST_NAME).stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def is_due(self) -> bool:
        """Return whether the index on disk is another than the one that is open."""
        return self._stamp() != self._opened

    def renewed(self, searcher: Searcher) -> Searcher:
        """Return what searches the index that is on disk now, and knows the queries that `searcher` knows.

        Raises Busy, and says why in the log, when there is none that can be used, or it is of another model."""
        stamp = self._stamp()
        try:
            index = Index.open(self.folder)
            if index.model_sha256 != searcher.index.model_sha256:
                raise BadInput(f"{self.folder} is of another model now: start the server again")
            made = searcher.over(index, pictures_by_source(index, self.data))
        except BadInput as error:  # it names paths of this machine: for the log, once, and not for others
            if self._told != stamp:
                log.error("the index has changed: %s", error)
            self._told = stamp
            raise Busy("the index has changed and cannot be used now: the log of the server says why") from None
        log.info("the index has changed: %d items are served", len(index))
        self._opened = stamp
        return made
