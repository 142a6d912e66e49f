"""An HTTP server on loopback that keeps files in memory, knows Range, and fails on demand."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Serves `files` (path -> bytes) under `url`. `faults[path]` is a list used up from the front, one a request; a
    path's list may end with "always": the fault before it stays.

    A number    answers with that HTTP status
    reset       half of the body, then the connection is reset
    truncated   half of the body under the Content-Length of the whole
    short       half of the body under a Content-Length of half: looks whole
    long        the body and ten bytes more
    wrong       other bytes of the right length
    stall       half of the body, then nothing
    silent      not even a header
    slow        the whole body in twenty pieces, 0.02 s apart
    drip        the body, a byte every 0.1 s
    drip header a header without end, a byte every 0.1 s
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        """Path -> how often it was asked for."""
        self.most_at_once = self._now = 0
        """Most requests that were answered at the same time."""
        self.queries: set[str] = set()
        """All query strings that came, without their "?"."""
        self.authorizations: set[str] = set()
        """All Authorization headers that came."""
        self.password = ""
        """Without it, as that of any user, every answer is 401; "" asks for none."""
        self.half_sent = threading.Event()
        """Set when a stalling body has got half way."""
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with owner.counted():
                    owner.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End all stalls and the server."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is answered meanwhile."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def next_fault(self, path: str) -> str:
        """Count a request; return how it fails, "" when it does not."""
        with self._lock:
            self.requests[path] += 1
            faults = self.faults.get(path, [])
            if not faults:
                return ""
            return faults[0] if faults[1:] == ["always"] else faults.pop(0)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a GET request with the file of its path, or as its next fault says."""
        path, _, query = handler.path.partition("?")
        self.queries.add(query)
        if given := handler.headers.get("Authorization"):
            self.authorizations.add(given)
        fault = self.next_fault(path)
        body = self.files.get(path)
        if self.password and self.password not in base64.b64decode((given or " ").split(" ")[1]).decode():
            fault = "401"
        handler.close_connection = True
        if fault == "silent":
            self.stopped.wait(20)
            return
        if fault == "drip header":
            self.drip(handler, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000)
            return
        if fault.isdigit() or body is None:
            handler.send_response(int(fault or 404))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if wanted:
            body = body[int(wanted[1]) : int(wanted[2]) + 1]
        half = body[: len(body) // 2]
        if fault == "wrong":
            body = bytes(b ^ 1 for b in body)
        body = {"short": half, "long": body + b"x" * 10}.get(fault, body)
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        try:
            if fault == "slow":
                step = -(-len(body) // 20)
                for start in range(0, len(body), step):
                    handler.wfile.write(body[start : start + step])
                    time.sleep(0.02)
            elif fault == "drip":
                self.drip(handler, body)
            elif fault in ("reset", "truncated", "stall"):
                handler.wfile.write(half)
                if fault == "stall":
                    self.half_sent.set()
                    self.stopped.wait(20)
                elif fault == "reset":  # closing with linger 0 sends RST instead of FIN
                    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    handler.connection.close()
            else:
                handler.wfile.write(body)
        except OSError:  # the client has gone
            pass

    def drip(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        """Send data, a byte every 0.1 s, until the client has gone."""
        try:
            for byte in data:
                handler.wfile.write(bytes([byte]))
                if self.stopped.wait(0.1):
                    return
        except OSError:
            pass
