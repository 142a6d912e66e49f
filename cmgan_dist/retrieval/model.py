"""A trained model in use: raw pictures or texts in, vectors of the common space out.

Each modality goes alone: encoding texts reads no image backbone and no picture, and the other way round.

Shapes: n items, D dimensions of a vector, F features of a backbone."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.data.folder import checked_path
from cmgan_dist.distributed.precision import autocast
from cmgan_dist.errors import BadInput, shown
from cmgan_dist.jobs.local import Advance, progress_of
from cmgan_dist.models.backbone import ImageBackbone, TextBackbone
from cmgan_dist.models.backbones import image_features, text_features
from cmgan_dist.models.generator import Generator, Modality
from cmgan_dist.models.saved import Saved, load_backbone, load_generator, read_model
from cmgan_dist.models.weights import first_line
from cmgan_dist.retrieval.embed import projected
from cmgan_dist.retrieval.inputs import is_one, pixels_of, text_of

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageItem = str | Path | bytes | np.ndarray | Image
    """A file's path, its bytes, the open file, uint8 [H, W], [H, W, 3] or [H, W, 4], or a PIL image."""

T = TypeVar("T")
log = logging.getLogger(__name__)
LOT = 16
"""Batches of texts that are sorted by their length together."""


FEATURE_ROWS = 1024
"""Rows of features that are projected together."""


class Model:
    """The best generator of a run with its backbones, in eval mode."""

    def __init__(self, saved: Saved, device: str | torch.device = "auto") -> None:
        """`device`: "auto" takes a GPU if there is one. Backbones are read when the first item comes."""
        self.saved, self.device = saved, _device_of(device)
        self.generator = load_generator(saved, backbones=False).to(self.device)
        self.scoring = saved.scoring
        self._backbones: dict[Modality, ImageBackbone | TextBackbone] = {}

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str | torch.device = "auto"
    ) -> Model:
        """Load a folder that `save_pretrained` wrote (a run or a copy of best/ too), else a model of the Hugging Face
        hub by its name "owner/name"; `revision` is a branch, tag or commit there. Raises BadInput when there is
        neither, or a file is damaged."""
        if Path(name).is_dir():
            return cls(read_model(name), device)
        from cmgan_dist.retrieval.hub import fetch_pretrained

        return cls(read_model(fetch_pretrained(str(name), revision)), device)

    def __repr__(self) -> str:
        return f"Model({str(self.saved.folder)!r}, {self.dim} dimensions, {len(self.classes)} classes, {self.device})"

    @property
    def dim(self) -> int:
        """D, the dimension of the vectors."""
        return self.saved.dim

    @property
    def classes(self) -> list[str]:
        """Class names in label order; empty when the model was trained on pairs without labels."""
        return self.saved.spec.data.classes

    def backbone(self, modality: Modality) -> ImageBackbone | TextBackbone:
        """Return what makes features of "image" or "text". Raises BadInput when it is not known or not there."""
        if modality not in self._backbones:
            self._backbones[modality] = load_backbone(self.saved, modality).to(self.device)
        return self._backbones[modality]

    def generator_for(self, raw: Sequence[Modality]) -> Generator:
        """Return the generator as it takes raw input of the modalities `raw`, and features of the others.

        Raises BadInput as `backbone` does."""
        for modality in raw:
            setattr(self.generator, f"{modality}_backbone", self.backbone(modality))
        return self.generator

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which an evaluation of the run projects features."""
        return autocast(self.device, self.saved.config.train.precision)

    @overload
    def encode_images(
        self,
        images: ImageItem | Iterable[ImageItem] | np.ndarray | Tensor,
        *,
        batch: int = ...,
        on_error: Literal["raise"] = ...,
        progress: bool | None = ...,
    ) -> np.ndarray: ...
    @overload
    def encode_images(
        self,
        images: ImageItem | Iterable[ImageItem] | np.ndarray | Tensor,
        *,
        batch: int = ...,
        on_error: Literal["skip"],
        progress: bool | None = ...,
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_images(
        self,
        images: ImageItem | Iterable[ImageItem] | np.ndarray | Tensor,
        *,
        batch: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the vectors of pictures, float32 [n, D], no longer than 1; features [n, F] are taken too.

        `images`: one or many paths, open files, bytes, arrays (uint8 [n, H, W, 3] are many) or PIL images; a generator
        is read as it goes, so that memory does not grow with it. `batch`: how many are decoded together. `on_error`:
        "skip" leaves out what is no picture and returns the vectors and the positions, int64 [n], of the items that
        they are of. `progress`: draw a bar on stderr, or print a line a minute where that is no terminal; None does so
        on a terminal. Raises BadInput naming the item that is no picture by its position."""
        rows, chosen = self._check(images, batch, on_error), _Chosen("images", on_error)
        if rows is not None:
            chosen.kept.extend(range(len(rows)))
            return chosen.returned(self._encode("image", _slices(rows, FEATURE_ROWS), torch.tensor))
        if isinstance(images, Tensor):
            images = images.numpy(force=True)
        if is_one(images):
            images = [cast("ImageItem", images)]
        backbone = cast(ImageBackbone, self.backbone("image"))
        size = self.saved.spec.image.image_size or 224

        def features(part: Sequence[tuple[int, object]]) -> Tensor:
            made = [chosen.take(lambda item, at: pixels_of(item, size, at), item, at) for at, item in part]
            pixels = [each for each in made if each is not None]
            if not pixels:
                return torch.zeros(0, backbone.dim)
            return image_features(backbone, torch.from_numpy(np.stack(pixels)).to(self.device))

        listed = cast("Iterable[object]", images)
        with _progress("pictures", listed, batch, progress) as advance:
            lots = _told(_lots(enumerate(listed), batch), advance)
            return chosen.returned(self._encode("image", lots, features))

    @overload
    def encode_texts(
        self,
        texts: str | Iterable[str] | np.ndarray | Tensor,
        *,
        batch: int = ...,
        on_error: Literal["raise"] = ...,
        progress: bool | None = ...,
    ) -> np.ndarray: ...
    @overload
    def encode_texts(
        self,
        texts: str | Iterable[str] | np.ndarray | Tensor,
        *,
        batch: int = ...,
        on_error: Literal["skip"],
        progress: bool | None = ...,
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_texts(
        self,
        texts: str | Iterable[str] | np.ndarray | Tensor,
        *,
        batch: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the vectors of texts, float32 [n, D], no longer than 1; features [n, F] are taken too.

        `batch`: how many go through the backbone together; the rest as of `encode_images`. Raises BadInput naming the
        text that is empty by its position."""
        rows, chosen = self._check(texts, batch, on_error), _Chosen("texts", on_error)
        if rows is not None:
            chosen.kept.extend(range(len(rows)))
            return chosen.returned(self._encode("text", _slices(rows, FEATURE_ROWS), torch.tensor))
        if isinstance(texts, bytes | bytearray):
            raise BadInput("the text is bytes: decode it first")
        if isinstance(texts, os.PathLike):
            raise BadInput(f"the text is the path {shown(os.fspath(texts))}: read it first")
        listed = [texts] if isinstance(texts, str) else list(texts)
        made = [chosen.take(text_of, text, position) for position, text in enumerate(listed)]
        good = [text for text in made if text is not None]
        backbone = cast(TextBackbone, self.backbone("text"))
        with _progress("texts", good, LOT * batch, progress) as advance:
            lots = _told(_lots(good, LOT * batch), advance)
            return chosen.returned(
                self._encode("text", lots, lambda lot: text_features(backbone, lot, self.device, batch))
            )

    def _check(self, items: object, batch: int, on_error: str) -> np.ndarray | None:
        """Return items that are features as float32 [n, F], None for raw ones. Raises BadInput at a wrong argument."""
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise BadInput(f"batch is {batch!r}, expected a whole number above 0")
        if on_error not in ("raise", "skip"):
            raise BadInput(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
        if not (is_one(items) or hasattr(items, "__iter__")) or (isinstance(items, np.ndarray) and not items.ndim):
            raise BadInput(f"{items!r} cannot be encoded: give an item, or several in a list")
        return _features(items)

    def export(self, path: str | Path, *, modality: Modality | None = None, backbone: bool = False) -> list[Path]:
        """Write the model as ONNX (``.onnx``) or a torch.export program (``.pt2``), a file for each modality or the one
        that `modality` names; return the paths. Features go in, or with `backbone` pixels and tokens; vectors come
        out: `export.export_model` has names and shapes. Raises BadInput when a file is not equal to the model within
        1e-5."""
        from cmgan_dist.retrieval.export import export_model

        return export_model(self.saved, self.generator, path, modality=modality, backbone=backbone)

    def save_pretrained(self, folder: str | Path, *, license: str = "") -> Path:
        """Write the model to a folder that can be given away, with a model card; `from_pretrained` reads it.

        `license`: the hub's identifier of the model's licence, such as "cc-by-4.0". Raises BadInput when the folder
        cannot be written."""
        from cmgan_dist.retrieval.hub import save_pretrained

        return save_pretrained(self.saved, folder, license=license)

    def push_to_hub(self, name: str, *, private: bool = False, license: str = "") -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub as "owner/name" and return the commit's URL.

        Raises BadInput with what the hub says."""
        from cmgan_dist.retrieval.hub import push_to_hub

        return push_to_hub(self.saved, name, private=private, license=license)

    @torch.no_grad()
    def _encode(self, modality: Modality, batches: Iterable[T], features: Callable[[T], Tensor]) -> np.ndarray:
        parts = [torch.zeros(0, self.dim)]
        for part in batches:
            made = features(part).to(self.device).float()
            expected = getattr(self.saved.spec, modality).dim
            if made.ndim != 2 or made.shape[1] != expected:
                raise BadInput(
                    f"the {modality} features have shape {list(made.shape)}, expected [n, {expected}]: give "
                    "those of the kind that the model was trained on"
                )
            items = projected(self.generator, modality, made)
            if not torch.isfinite(items.common).all():
                raise BadInput(
                    f"{modality} vectors are not finite: give smaller features, or another model if this one diverged"
                )
            parts.append(items.vectors(self.scoring, modality))
        return torch.cat(parts).numpy()


def load_model(run: str | Path, device: str | torch.device = "auto") -> Model:
    """Load the best model of a run, or a copy of its best/ folder, for use.

    Raises BadInput when a file is missing, damaged or of another version, or there is no such device."""
    return Model(read_model(checked_path(run, "run")), device)


def _device_of(name: str | torch.device) -> torch.device:
    """Return a device by its name, "auto" a GPU if there is one. Raises BadInput when there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BadInput(f"device is {name!r}, which is not here ({first_line(error)}): give 'cpu' or 'auto'") from None
    return device


class _Chosen:
    """Which items were encoded, where bad ones are left out."""

    def __init__(self, what: str, on_error: str) -> None:
        """`what`: images or texts."""
        self.what, self.on_error = what, on_error
        self.kept: list[int] = []
        self.left_out: list[str] = []

    def take(self, read: Callable[[object, int], T], item: object, position: int) -> T | None:
        """Return what `read` makes of an item and its position, None where it is left out. Raises what `read`
        raises."""
        try:
            made = read(item, position)
        except BadInput as error:
            if self.on_error == "raise":
                raise
            self.left_out.append(str(error))
            return None
        self.kept.append(position)
        return made

    def returned(self, vectors: np.ndarray) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return what the caller asked for, and say what was left out."""
        if self.left_out:
            log.warning("%d of %s left out, the first: %s", len(self.left_out), self.what, self.left_out[0])
        return vectors if self.on_error == "raise" else (vectors, np.asarray(self.kept, np.int64))


def _progress(
    title: str, items: Iterable[object], few: int, asked: bool | None
) -> contextlib.AbstractContextManager[Advance]:
    """Return a context with a bar where it is asked for (None: on a terminal) and there are more items than `few`."""
    total = len(items) if isinstance(items, Sized) else None
    if asked is False or (total is not None and total <= few) or (asked is None and not sys.stderr.isatty()):
        return contextlib.nullcontext(lambda count: None)
    return progress_of(title, total)


def _told(lots: Iterable[list[T]], advance: Advance) -> Iterator[list[T]]:
    """Yield the lots and tell, when the next is asked for, that one is done."""
    for lot in lots:
        yield lot
        advance(len(lot))


def _features(items: object) -> np.ndarray | None:
    """Return an array or tensor of features as float32 [n, F], None for other items.

    Raises BadInput when they are of another shape or not finite."""
    rows = items
    if isinstance(items, Tensor):
        rows = items.detach().cpu().to(torch.float32 if items.is_floating_point() else items.dtype).numpy()
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        return None
    if rows.ndim != 2:
        raise BadInput(f"the features have shape {list(rows.shape)}, expected [n, F]: give a row for each item")
    if not np.isfinite(rows).all():
        raise BadInput("the features hold NaN or Inf: give finite numbers")
    return np.ascontiguousarray(rows, dtype=np.float32)


def _lots(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of at most `size`, reading on only when the next is asked for."""
    iterator = iter(items)
    while lot := list(itertools.islice(iterator, size)):
        yield lot


def _slices(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the rows in pieces of at most `size`."""
    return (rows[first : first + size] for first in range(0, len(rows), size))
