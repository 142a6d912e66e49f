"""Connections of a server, bounded: how many there are, and how long one may be silent.

uvicorn bounds neither: it counts requests, and a connection that never sends one stays open. `server_of` returns one
with what it lacks. A new connection beyond the bound takes the place of the one that has been silent for the
longest; a request that is being answered is never given up for another."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import resource
import socket
from collections.abc import Collection
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmgan_dist.errors import BadInput

BACKLOG = 64
"""Connections that are accepted in one go, before the first is counted."""
KEPT_FREE = 64 + 3 * BACKLOG
"""Open files that are left to other things than connections."""


def most_connections(wanted: int) -> int:
    """Return how many connections may be open: `wanted`, fewer where the process may not have that many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - KEPT_FREE))


class _Bounded(H11Protocol):
    most: int
    seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self.silent_since = self.loop.time()
        self._watch()
        others: list[Any] = [each for each in self.connections if each is not self and not each.transport.is_closing()]
        if len(others) >= self.most:
            silent = [each for each in others if not each.answering]
            min(silent, key=lambda each: each.silent_since, default=self).transport.abort()

    @property
    def answering(self) -> bool:
        """Whether a request has come that is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Give the client its time to send a request, from now on; while one is answered the application bounds it."""
        if self.answering:
            self._unwatch()
        elif self._timer is None:
            self.silent_since = self.loop.time()
            self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._unwatch()
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()
        self.resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Say in one sentence that what came is no HTTP, where an answer can still begin."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.answering:
            self.transport.abort()
            return
        body = json.dumps({"error": "this is no HTTP request that can be read: send another"}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = [h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def server_of(app: Any, most: int, seconds: float) -> uvicorn.Server:
    """Return the server of an ASGI application, with at most `most` connections, each of which must send a whole
    request header, and take what it is answered, within `seconds`.

    Its log is that of failures: what strangers send does not fill it."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    protocol = type("Bounded", (_Bounded,), {"most": most_connections(most), "seconds": seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        backlog=BACKLOG,
        log_level="error",
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    return uvicorn.Server(config)


def hosts_of(address: str, others: Collection[str]) -> frozenset[str]:
    """Return the names under which a server on the IP `address` may be asked: where only this machine can reach it,
    those of this machine and `others`; else none are returned, as any will do.

    A page of another host could else have a name of its own lead here, and read what a browser on this machine gets
    (DNS rebinding)."""
    if not ipaddress.ip_address(address).is_loopback:
        return frozenset()
    return frozenset({"localhost", "127.0.0.1", "::1", address, *(other.lower() for other in others)})


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Raises BadInput when the address cannot be had, or is no
    address at all."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise BadInput(
            f"--host {ascii(host)[1:-1]} --port {port} cannot be listened on ({error}): choose others"
        ) from None
