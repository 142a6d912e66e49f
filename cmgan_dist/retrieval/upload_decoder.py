"""Decodes pictures of strangers in a process of their own, so that none stops the server, whatever it holds.

`Decoder.decode` hands a picture to a worker, which is this file run as a program. The worker forks for each picture,
and the kernel ends a fork that takes more than SECONDS of processor time or MEMORY_BYTES. The worker knows nothing of
the picture, needs no restart after a bad one and ends with the server.

What goes through the pipes: a byte that counts the parts, then each as its length in 8 bytes and its bytes. A request
is one part, an answer two (thumbnail, square) or one: why not."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from PIL import Image

from cmgan_dist.data.image import decode_image
from cmgan_dist.errors import BadSample
from cmgan_dist.retrieval.pictures import thumbnail

log = logging.getLogger(__name__)
MOST_PIXELS = 51_000_000
"""An upload with more is refused before it is decoded; phones take photographs of 50 million."""
MOST_SCANS = 32
"""A JPEG with more is refused before it is decoded: each scan costs a pass over all pixels. Those of cameras and
programs have one, or about ten where they are progressive."""
SECONDS = 6
"""Processor time that one picture may take."""
WALL_SECONDS = 30
"""Time that one may take where the machine is busy with other things."""
MEMORY_BYTES = 1 << 30
"""Memory that one picture may take."""

ROOT = Path(__file__).resolve().parents[2]
_MARKER = re.compile(b"\xff+([^\x00\xff])")
_PLAIN_MARKERS = frozenset([0x01, *range(0xD0, 0xD8)])
"""Second bytes of JPEG markers without a segment: TEM, RST0 to RST7 (ITU-T T.81, table B.1)."""
_END, _SCAN = 0xD9, 0xDA
_REASONS: dict[int, str] = {
    signal.SIGXCPU: f"decoding the picture takes more than {SECONDS} s",
    signal.SIGALRM: f"decoding the picture takes more than {WALL_SECONDS} s",
}


@dataclass(frozen=True)
class Decoded:
    """What the server keeps of an upload."""

    thumbnail: bytes
    """Small JPEG."""
    square: bytes
    """PNG of the pixels that a model sees of it: encoding this gives the vector of the picture itself."""


class Decoder:
    """Decodes uploads, one at a time. Threads may share it."""

    def __init__(self, size: int) -> None:
        """`size`: side in pixels of the square that the model sees."""
        self.size = size
        self._worker: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._decoding, self._starting = threading.Lock(), threading.Lock()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the worker unless it runs; it imports for seconds, while others go on. Raises RuntimeError when the
        decoder is closed."""
        with self._starting:
            if self._closed:
                raise RuntimeError("the decoder of uploads is closed")
            if self._worker is None or self._worker.poll() is not None:
                self._worker = subprocess.Popen(
                    [sys.executable, "-m", "cmgan_dist.retrieval.upload_decoder", str(self.size)],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for the server
                )
            return self._worker

    def decode(self, data: bytes) -> Decoded:
        """Return what is kept of an encoded picture. Raises BadSample with the reason when it cannot be decoded within
        the bounds, RuntimeError when the worker was killed twice or the decoder is closed."""
        with self._decoding:
            for _ in range(2):
                worker = self.start()
                assert worker.stdin is not None
                assert worker.stdout is not None
                try:
                    _write(worker.stdin, [data])
                    parts = _read(worker.stdout)
                except BrokenPipeError:
                    parts = []
                if len(parts) == 2:
                    return Decoded(*parts)
                if parts:
                    raise BadSample(parts[0].decode())
                _end(worker)
            raise RuntimeError("the decoder of uploads was killed")

    def close(self) -> None:
        """End the worker, and what it decodes."""
        with self._starting:
            self._closed = True
            if self._worker is not None:
                if self._worker.poll() is None:
                    os.killpg(self._worker.pid, signal.SIGKILL)
                _end(self._worker)


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Wait for a worker that ends, and let go of what was not written to it any more."""
    worker.wait()
    if worker.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def _write(file: IO[bytes], parts: list[bytes]) -> None:
    file.write(bytes([len(parts)]))
    for part in parts:
        file.write(struct.pack(">Q", len(part)))
        file.write(part)
    file.flush()


def _read(file: IO[bytes]) -> list[bytes]:
    """Return the parts; none where the other side has ended."""
    parts = []
    for _ in range(ord(file.read(1) or b"\0")):
        length = file.read(8)
        part = file.read(struct.unpack(">Q", length)[0]) if len(length) == 8 else None
        if part is None or len(part) < struct.unpack(">Q", length)[0]:
            return []
        parts.append(part)
    return parts


# ---------------------------------------------------------------------------------------------- worker


def scans_of(data: bytes) -> int:
    """Return the number of scans of a JPEG, by its markers alone as libjpeg meets them; 0 for anything else."""
    if data[:2] != b"\xff\xd8":
        return 0
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[1][0] != _END:
        at, marker = found.end(), found[1][0]
        scans += marker == _SCAN
        if marker not in _PLAIN_MARKERS:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return scans


def decoded(data: bytes, size: int) -> Decoded:
    """Return what is kept of an encoded picture: thumbnail, and square of `size` pixels. Raises BadSample with the
    reason when it is no picture, or too large a one."""
    if (scans := scans_of(data)) > MOST_SCANS:
        raise BadSample(f"the JPEG has {scans} scans, more than {MOST_SCANS}")
    small = thumbnail(data, most_pixels=MOST_PIXELS)
    square = io.BytesIO()
    Image.fromarray(decode_image(data, size)[..., :3]).save(square, "PNG", compress_level=1)
    return Decoded(small, square.getvalue())


def _answer(data: bytes, size: int) -> list[bytes]:
    try:
        made = decoded(data, size)
    except BadSample as error:
        return [str(error).encode()]
    except (MemoryError, RuntimeError):  # the latter is torch's
        return [b"decoding the picture takes too much memory"]
    return [made.thumbnail, made.square]


def _bound() -> None:
    """Bound what this process may take from now on."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    signal.alarm(WALL_SECONDS)
    if sys.platform == "linux":  # elsewhere nothing tells what is taken already
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        bound = taken + MEMORY_BYTES if most == resource.RLIM_INFINITY else min(taken + MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (bound, most))


def _in_a_fork(data: bytes, size: int) -> bytes:
    """Return the answer to one picture, from a process that ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _bound()
            with open(writing, "wb") as out:
                _write(out, _answer(data, size))
            code = 0
        except Exception:  # nothing of this process may go on in the worker's loop
            log.exception("an upload cannot be decoded")
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as answer:
        made = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return made
    refused = io.BytesIO()
    _write(refused, [_REASONS.get(-code, "decoding the picture fails").encode()])
    return refused.getvalue()


def main() -> None:
    """Answer requests on stdin until it ends."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused all the same
    torch.set_num_threads(1)  # threads are not there after a fork
    Image.init()
    while parts := _read(sys.stdin.buffer):
        sys.stdout.buffer.write(_in_a_fork(parts[0], int(sys.argv[1])))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
