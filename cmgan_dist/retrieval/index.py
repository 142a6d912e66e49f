"""An index of embeddings: exact up to 100,000 vectors, above that faiss' IVF with vectors of one byte a dimension.

    index = Index.build("EMB", "INDEX")
    index = Index.open("INDEX")
    index.search(model.encode_texts("a red heart"), k=10, modality="image")

IVF (Sivic & Zisserman, ICCV 2003) cuts the space into cells around centroids and compares a query with the vectors of
the nearest cells only; how many is chosen when the index is built, for a recall that is measured then.

Shapes: Q queries, N vectors, E dimensions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmgan_dist.data.folder import check_output, checked_path
from cmgan_dist.errors import BadInput, refuse_url
from cmgan_dist.jobs.staging import staging
from cmgan_dist.retrieval.index_files import (
    ENCODER_NAMES,
    ITEMS_NAME,
    MANIFEST_NAME,
    VECTORS_NAMES,
    IndexManifest,
    aside,
    changing,
    commit,
    read_manifest,
    sums_of,
    whole_file,
)
from cmgan_dist.retrieval.index_items import Hit, Items, are_several, write_items
from cmgan_dist.retrieval.nearest import ExactVectors, Found, fitting_queries, write_exact

if TYPE_CHECKING:
    from cmgan_dist.models.generator import Modality
    from cmgan_dist.models.saved import Saved
    from cmgan_dist.retrieval.index_build import Added, Block
    from cmgan_dist.retrieval.model import Model

MOST_EXACT = 100_000
"""Vectors up to which "auto" searches all of them: 5 ms a query."""
CHECKED_CAPTIONS = 32
"""Captions of an index that query encoders are compared with the model on."""
MARGIN = 0.1
"""Share by which byte ranges are wider than those of the vectors trained on, on each side, for vectors to come."""


class IvfVectors:
    """Vectors in a faiss index IVF,SQ8: inner product, ids of our own."""

    def __init__(self, index: Any, nprobe: int) -> None:
        """`nprobe`: cells that a query visits."""
        self.index, self.nprobe = index, nprobe

    @classmethod
    def open(cls, path: Path, manifest: IndexManifest, *, mapped: bool) -> IvfVectors:
        """`mapped`: read what a query needs only, for searching; else all of it, for changing.

        Raises BadInput when the file is not the index that the manifest tells of."""
        faiss = _faiss()
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
        except RuntimeError as error:
            raise BadInput(f"{path} cannot be read ({_reason(error)}): restore it or index again") from None
        if mapped:
            # threads that read ahead take five times as long as the query itself
            faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        if (index.ntotal, index.d) != (manifest.count, manifest.dim):
            raise BadInput(
                f"{path} holds {index.ntotal} vectors of {index.d} numbers, expected {manifest.count} of "
                f"{manifest.dim}: restore it or index again"
            )
        return cls(index, manifest.nprobe)

    @classmethod
    def train(cls, sample: np.ndarray, cells: int) -> IvfVectors:
        """Return an index without vectors whose cells and byte ranges come from a sample, float32 [n, E]."""
        faiss = _faiss()
        index = faiss.index_factory(sample.shape[1], f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # it would warn on stderr
        index.sq.rangestat_arg = MARGIN
        index.train(sample)
        return cls(index, 1)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, nprobe: int | None = None) -> list[Found]:
        """Return the nearest of each query; `allowed`: ids that may be found, ascending, None for all.

        A filter leaves fewer vectors in each cell, so as many more cells are visited; all of them where k are not
        found otherwise."""
        faiss = _faiss()
        fitting = self.index.ntotal if allowed is None else len(allowed)
        if not fitting:
            return [(np.zeros(0, np.float32), np.zeros(0, np.int64))] * len(queries)
        options: dict[str, Any] = {}
        if allowed is not None:
            bits = np.zeros(allowed[-1] + 1, bool)
            bits[allowed] = True
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
        visited = min(self.index.nlist, -(-(nprobe or self.nprobe) * self.index.ntotal // fitting))
        scores = np.empty((len(queries), min(k, fitting)), np.float32)
        ids = np.full(scores.shape, -1, np.int64)
        rest = np.arange(len(queries))
        while len(rest):
            parameters = faiss.SearchParametersIVF(nprobe=visited, **options)
            scores[rest], ids[rest] = self.index.search(queries[rest], scores.shape[1], params=parameters)
            rest = rest[(ids[rest] < 0).any(1)] if visited < self.index.nlist else rest[:0]
            visited = min(self.index.nlist, 4 * visited)
        order = np.lexsort((ids, -scores), axis=1)
        return list(zip(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1), strict=True))

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with some ids, which must be there, as they are stored, float32 [n, E]."""
        faiss = _faiss()
        out = np.empty((len(ids), self.index.d), np.float32)
        order = np.argsort(ids)
        cells = self.index.invlists
        for cell in range(self.index.nlist):
            if size := cells.list_size(cell):
                held = faiss.rev_swig_ptr(cells.get_ids(cell), size)
                at = order[np.minimum(np.searchsorted(ids, held, sorter=order), len(ids) - 1)]
                for offset in np.flatnonzero(ids[at] == held).tolist():
                    self.index.reconstruct_from_offset(cell, offset, faiss.swig_ptr(out[at[offset]]))
        return out

    def remove(self, ids: np.ndarray) -> None:
        """Take out the vectors with some ids."""
        faiss = _faiss()
        self.index.remove_ids(faiss.IDSelectorBatch(ids))

    def add(self, blocks: Iterable[Block]) -> None:
        """Take in vectors."""
        for block in blocks:
            self.index.add_with_ids(block.vectors, block.ids)

    def write(self, path: Path) -> None:
        """Write the index to a file. Raises OSError."""
        faiss = _faiss()
        try:
            faiss.write_index(self.index, str(path))
        except RuntimeError as error:
            raise OSError(_reason(error)) from None


def _faiss() -> Any:
    """Return the package. Raises BadInput when it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise BadInput("an index of kind ivf_sq8 needs faiss: pip install 'cmgan-dist[use]'") from None
    return faiss


def _reason(error: RuntimeError) -> str:
    """Return what faiss says, without the place in its source."""
    return str(error).strip().splitlines()[-1].strip()


@dataclass(frozen=True)
class Opened:
    """What belongs together of an index that is open: a search that runs while the index is changed keeps its own."""

    manifest: IndexManifest
    paths: dict[str, Path]
    """Name -> where the file is."""
    items: Items
    vectors: ExactVectors | IvfVectors


class Index:
    """An index on disk, open for searching."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Open what index.json tells of; see `open`, which also knows what to do while it is being changed."""
        self.folder = folder
        manifest = read_manifest(folder)
        paths = {name: whole_file(folder, name, sums, verify=verify) for name, sums in manifest.files.items()}
        self._opened = Opened(manifest, paths, *_open_files(paths, manifest))

    @property
    def manifest(self) -> IndexManifest:
        """What index.json says."""
        return self._opened.manifest

    @property
    def items(self) -> Items:
        """What the vectors are of."""
        return self._opened.items

    @property
    def vectors(self) -> ExactVectors | IvfVectors:
        """The vectors."""
        return self._opened.vectors

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Index:
        """Open an index; its vectors are mapped, not read.

        `verify`: compare the SHA-256 of every byte, about a second a GB. Without it sizes are compared, and all bytes
        of files up to 4 MiB and pieces of larger ones. Raises BadInput naming the file that is missing, cut, damaged,
        of another index or of another version."""
        refuse_url(path, "index")
        folder = checked_path(path, "index")
        for last in (False, False, True):
            try:
                index = cls(folder, verify=verify)
                if last or read_manifest(index.folder) == index.manifest:
                    return index
            except BadInput:
                if last:
                    raise
            time.sleep(0.02)  # somebody may be giving new files their names just now
        raise AssertionError

    @classmethod
    def build(cls, embeddings: str | Path, output: str | Path, *, kind: str = "auto", progress: bool = False) -> Index:
        """Index embeddings in the folder `output`, in place of the index that may be there, and open it.

        `kind`: exact, ivf_sq8, or auto, which is exact up to MOST_EXACT vectors. `progress`: draw a bar on stderr.
        Raises BadInput when the embeddings cannot be used or the folder cannot be written."""
        from cmgan_dist.retrieval.index_build import Added, build_ivf, described

        folder, added = checked_path(output, "output"), Added.open(embeddings, progress=progress)
        check_output(folder, MANIFEST_NAME, "output")
        if kind not in ("auto", *VECTORS_NAMES):
            raise BadInput(f"kind is {kind!r}: it must be auto, exact or ivf_sq8")
        if kind == "auto":
            kind = "exact" if added.count <= MOST_EXACT else "ivf_sq8"
        manifest = described(added, kind)
        with changing(folder):
            path = aside(folder, VECTORS_NAMES[kind])
            if kind == "exact":
                write_exact(path, (block.vectors for block in added.blocks()), added.count, manifest.dim)
            else:
                made, recall = build_ivf(added, IvfVectors.train)
                made.write(path)
                manifest = replace(manifest, nprobe=made.nprobe, recall=recall)
            write_items(aside(folder, ITEMS_NAME), added.tables(manifest.classes))
            _finish(folder, manifest)
        return cls.open(folder)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def dim(self) -> int:
        """E."""
        return self.manifest.dim

    @property
    def classes(self) -> list[str]:
        """Names of classes that items may have."""
        return self.manifest.classes

    @property
    def model_sha256(self) -> str:
        """SHA-256 of best/model.safetensors of the model that made the vectors."""
        return self.manifest.model["sha256"]

    @property
    def source(self) -> dict[str, str]:
        """What the vectors that the index was built with are of: "kind" (shards, pictures or texts) and "location"."""
        return self.manifest.source

    @property
    def chance(self) -> tuple[float, float]:
        """Mean and standard deviation of scores between random items, an image and a text where there are both."""
        return self.manifest.chance

    @property
    def near(self) -> float:
        """Score that the best hit of 9 in 10 stored items reaches, their own sample left out."""
        return self.manifest.near

    def source_of(self, item: int) -> dict[str, str]:
        """Return the source, as `source`, of the embeddings that an item came with."""
        return dict([e["source"] for e in self.manifest.embeddings if e["first_id"] <= item][-1])

    def check_model(self, saved: Saved) -> None:
        """Raises BadInput when the index is of another model."""
        from cmgan_dist.models.saved import MODEL_NAME

        if saved.spec.files.get(MODEL_NAME) != self.model_sha256:
            raise BadInput(f"{self.folder} was made with another model than {saved.folder}: embed and index again")

    def read_model(self, run: str = "") -> Saved:
        """Read the model that made the vectors, from `run` or where the index says that it was.

        Raises BadInput when it is not there, damaged, or another model."""
        from cmgan_dist.models.saved import read_model

        found = run or self.manifest.model["run"]
        if not run and not Path(found).is_dir():
            raise BadInput(f"the model of {self.folder} is not at {found!r}: name its run by --run")
        saved = read_model(found)
        self.check_model(saved)
        return saved

    def search(
        self, vectors: np.ndarray, k: int = 10, *, modality: str | None = None, classes: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """Return the k items nearest to each of `vectors`, [Q, E] or [E], by inner product: best first, equal by id.

        `modality`: only "image" or "text". `classes`: only items that have one of them. A query gets fewer than k only
        where no more fit. Raises BadInput when something does not fit the index."""
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise BadInput(f"k is {k!r}: it must be a whole number of at least 1")
        if modality not in (None, "image", "text"):
            raise BadInput(f"modality is {modality!r}: it must be image or text")
        if classes is not None and not (are_several(classes) and all(isinstance(name, str) for name in classes)):
            raise BadInput(f"classes are {classes!r}: give a list of names")
        opened, queries, allowed = self._opened, fitting_queries(vectors, self.dim), None
        if modality is not None or classes is not None:
            allowed = opened.items.allowed(modality, None if classes is None else tuple(classes))
        if not len(queries):
            return []
        found = opened.vectors.search(queries, min(int(k), len(opened.items)), allowed)
        return [opened.items.hits(*each) for each in found]

    def get(self, item: int) -> Hit:
        """Return an item by its id, with score 1. Raises BadInput when there is none."""
        return self.items.hits(np.ones(1), _one_id(item))[0]

    def vector(self, item: int) -> np.ndarray:
        """Return an item's vector as it is stored, float32 [E]. Raises BadInput when there is none."""
        ids, opened = _one_id(item), self._opened
        opened.items.positions(ids)
        return opened.vectors.take(ids)[0]

    def add(self, embeddings: str | Path, *, progress: bool = False) -> int:
        """Add embeddings of the same model, in one step; return how many vectors they are.

        An ivf_sq8 index keeps the cells it was built with, and the recall that was measured then. Raises BadInput when
        the embeddings are of another model, in the index already, or too far from what an ivf_sq8 index can hold."""
        from cmgan_dist.retrieval.index_build import Added, described

        with changing(self.folder):
            self._reload()
            added = Added.open(embeddings, first_id=self.manifest.next_id, progress=progress)
            self._replace(np.ones(len(self), bool), described(added, self.manifest.kind, self.manifest), added)
        self._reload()
        return added.count

    def remove(self, items: Sequence[int] | Sequence[str]) -> int:
        """Remove items by id, or all items with some keys, in one step and from the disk; return how many.

        Raises BadInput when one is not there, or nothing would be left."""
        if not are_several(items):
            raise BadInput(f"items are {items!r}: give a list of ids or keys")
        with changing(self.folder):
            self._reload()
            kept = np.ones(len(self), bool)
            for item in items:
                ids = self.items.of_key(item) if isinstance(item, str) else _one_id(item)
                kept[self.items.positions(ids)] = False
            if not kept.any():
                raise BadInput(f"nothing would be left of the index {self.folder}: remove the folder")
            if not kept.all():
                self._replace(kept, replace(self.manifest, count=int(kept.sum())), None)
        self._reload()
        return int((~kept).sum())

    def query_encoder(self, modality: Modality) -> Path | None:
        """Return the file that encodes queries of "image" or "text", None where the index has none."""
        return self._opened.paths.get(ENCODER_NAMES[modality])

    def add_query_encoders(self, model: Model) -> None:
        """Put the model, which made the vectors, into the index as `Model.export` writes it, in one step.

        A search then needs neither the run nor torch. Raises BadInput when it is another model, a package is missing,
        or what was exported encodes captions of the index otherwise than the model."""
        from cmgan_dist.retrieval.query_encoder import check_encoder

        with changing(self.folder):
            self._reload()
            self.check_model(model.saved)
            with staging(self.folder) as folder:
                model.export(folder / "query.onnx", backbone=True)
                check_encoder(folder / ENCODER_NAMES["text"], model, self.items.captions(CHECKED_CAPTIONS))
                for name in ENCODER_NAMES.values():
                    os.replace(folder / name, aside(self.folder, name))
            files = {name: sums_of(aside(self.folder, name)) for name in ENCODER_NAMES.values()}
            commit(self.folder, replace(self.manifest, files=self.manifest.files | files), list(files))
        self._reload()

    def _reload(self) -> None:
        """Open anew what is on disk now."""
        self._opened = Index.open(self.folder)._opened

    def _replace(self, kept: np.ndarray, manifest: IndexManifest, added: Added | None) -> None:
        """Make the items that are `kept`, bool [N], and those that are added the index."""
        name = VECTORS_NAMES[manifest.kind]
        blocks = added.blocks() if added else iter(())
        if isinstance(self.vectors, ExactVectors):
            rows = chain(self.vectors.blocks(kept), (block.vectors for block in blocks))
            write_exact(aside(self.folder, name), rows, manifest.count, self.dim)
        else:
            changed = IvfVectors.open(self.folder / name, self.manifest, mapped=False)
            if not kept.all():
                changed.remove(self.items.ids[~kept])
            changed.add(blocks)
            if added:
                added.check_stored(changed.take)
            changed.write(aside(self.folder, name))
        tables = added.tables(manifest.classes) if added else iter(())
        write_items(aside(self.folder, ITEMS_NAME), chain([self.items.kept(kept)], tables))
        _finish(self.folder, manifest)


def _one_id(item: object) -> np.ndarray:
    """Return an item's id as int64 [1]. Raises BadInput when it is none."""
    if isinstance(item, bool) or not isinstance(item, int | np.integer) or abs(int(item)) >= 1 << 63:
        raise BadInput(f"item {item!r} is no id: give a whole number, as a hit has it")
    return np.asarray([item], np.int64)


def _open_files(paths: dict[str, Path], manifest: IndexManifest) -> tuple[Items, ExactVectors | IvfVectors]:
    """Open the items and vectors of an index. Raises BadInput when they do not fit index.json."""
    items, path = Items(paths[ITEMS_NAME], manifest.classes), paths[VECTORS_NAMES[manifest.kind]]
    if len(items) != manifest.count:
        raise BadInput(f"{items.path} has {len(items)} rows, expected {manifest.count}: restore it or index again")
    if manifest.kind == "exact":
        return items, ExactVectors(path, items.ids, manifest.dim)
    return items, IvfVectors.open(path, manifest, mapped=True)


def _finish(folder: Path, manifest: IndexManifest) -> None:
    """Measure chance, and what is near, on the files that were written aside, and make them the index."""
    from cmgan_dist.retrieval.index_build import measure_chance, measure_near

    paths = {name: aside(folder, name) for name in (ITEMS_NAME, VECTORS_NAMES[manifest.kind])}
    items, vectors = _open_files(paths, manifest)
    measured = replace(
        manifest, chance=measure_chance(items, vectors.take, manifest.dim), near=measure_near(items, vectors)
    )
    kept = {name: sums for name, sums in manifest.files.items() if name in ENCODER_NAMES.values()}
    files = {name: sums_of(path) for name, path in paths.items()}
    commit(folder, replace(measured, files=files | kept), list(files))
