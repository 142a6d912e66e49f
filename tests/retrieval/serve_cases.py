"""What the server is tested over: an index in memory, a model without weights, and a server on a free port."""

from __future__ import annotations

import colorsys
import contextlib
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.connections import listen, server_of
from cmgan_dist.retrieval.index_items import Hit
from cmgan_dist.retrieval.pictures import Pictures
from cmgan_dist.retrieval.serve import Limits, build_app
from cmgan_dist.retrieval.upload_decoder import Decoder

WORDS = ["red", "yellow", "green", "cyan", "blue", "purple"]
"""Hues, a sixth of the circle apart: what the stand-in model knows of the world."""
CLASSES = ["warm", "cold", "a, b <i>&amp;</i>"]
HOSTILE = '"><img src=x onerror="document.title=1"><script>document.title=2</script> \u202e javascript:alert(1)'


def colour(hue: float, size: tuple[int, int] = (64, 48), format: str = "PNG") -> bytes:
    """Return an encoded picture of one colour; `hue` in 0..1."""
    out = io.BytesIO()
    Image.new("RGB", size, tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1, 1))).save(out, format)
    return out.getvalue()


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Return an image in a format, with Pillow's options of it."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def empty_png(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    """Return a PNG that says it has width x height pixels of `depth` bits and a colour type, and has none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def on_circle(hue: float) -> np.ndarray:
    """Return float32 [3], unit length: the hue as a point of a circle, and nothing."""
    return np.asarray([np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue), 0], np.float32)


class HueModel:
    """Encodes a picture as its mean colour's hue and a text as that of the word of WORDS in it; a text without one is
    far from all. `seconds`: how long one takes."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.encoded, self.at_once, self.most_at_once = seconds, 0, 0, 0

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        with self._counted(len(texts)):
            known = [[WORDS.index(word) for word in text.lower().split() if word in WORDS] for text in texts]
            nothing = np.asarray([0, 0, 1], np.float32)
            return np.stack([on_circle(found[0] / len(WORDS)) if found else nothing for found in known])

    def encode_images(self, images: Sequence[bytes]) -> np.ndarray:
        with self._counted(len(images)):
            means = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean((0, 1)) / 255 for data in images]
            return np.stack([on_circle(colorsys.rgb_to_hsv(*mean)[0]) for mean in means])

    @contextlib.contextmanager
    def _counted(self, items: int) -> Iterator[None]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.seconds)
        yield
        self.at_once -= 1
        self.encoded += items


@dataclass
class MemoryIndex:
    """What the server uses of `Index`, over vectors in memory, float32 [N, E] of unit length."""

    vectors: np.ndarray
    hits: list[Hit]
    classes: list[str]
    chance: tuple[float, float] = (0.0, 0.3)
    near: float = 0.6
    source: dict[str, str] = field(default_factory=lambda: {"kind": "texts", "location": ""})

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.hits)

    def get(self, id: int) -> Hit:
        if not 0 <= id < len(self.hits):
            raise BadInput(f"item {id} is not in the index")
        return self.hits[id]

    def vector(self, id: int) -> np.ndarray:
        return self.vectors[self.get(id).id]

    @property
    def items(self) -> MemoryIndex:
        return self

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.hits))

    def allowed(self, modality: str | None, classes: tuple[str, ...] | None) -> np.ndarray:
        fits = [h.id for h in self.hits if modality in (None, h.modality) and (not classes or {*classes} & {*h.labels})]
        return np.asarray(fits, np.int64)

    def search(
        self, vectors: np.ndarray, k: int = 10, *, modality: str | None = None, classes: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        ids = self.allowed(modality, classes and tuple(classes))
        scores = vectors @ self.vectors[ids].T
        best = np.argsort(-scores, 1, kind="stable")[:, :k]
        return [
            [replace(self.hits[ids[i]], score=float(row[i])) for i in found]
            for row, found in zip(scores, best, strict=True)
        ]


def hue_index(folder: Path, pictures: int = 60) -> MemoryIndex:
    """Return an index of `pictures` coloured pictures, which are written to `folder`, each with a text of its hue."""
    hits: list[Hit] = []
    vectors = []
    folder.mkdir()
    for i in range(pictures):
        hue = i / pictures
        key, nearest = f"{i:03d}.png", round(hue * len(WORDS)) % len(WORDS)
        (folder / key).write_bytes(colour(hue))
        labels = ("warm",) if nearest in (0, 1) else ("cold",)
        caption = HOSTILE if i == 3 else f"something {WORDS[nearest]}, number {i}"
        own = ((caption,), labels, "pictures-000000", i)
        hits.append(Hit(len(hits), 0.0, "image", key, None, *own, len(hits)))
        hits.append(Hit(len(hits), 0.0, "text", key, caption, *own, len(hits) - 1))
        vectors += [on_circle(hue), on_circle(hue + 0.001)]
    return MemoryIndex(np.stack(vectors), hits, CLASSES, source={"kind": "pictures", "location": str(folder)})


@contextlib.contextmanager
def running(
    index: MemoryIndex,
    model: HueModel,
    pictures: Pictures | None = None,
    limits: Limits | None = None,
    decoder: Decoder | None = None,
    **options: Any,
) -> Iterator[str]:
    """Serve what `build_app` makes of the arguments from a thread of this process; yields the address."""
    app = build_app(index, model, lambda _: pictures, decoder or Decoder(32), limits=limits, **options)
    bounds = limits or Limits()
    server = server_of(app, bounds.connections, bounds.idle_seconds)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def error_of(answer: httpx2.Response, status: int) -> str:
    """The sentence of an error; it is all that there is."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])
