"""How much a server does at a time: callers that work or wait, and bytes in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Busy(Exception):
    """There is no room for a request now. The message is one sentence that says what to do."""

    def __init__(self, sentence: str = "the server is busy: try again in a few seconds") -> None:
        super().__init__(sentence)


class Gate:
    """Lets `at_once` callers work at a time and the others wait; raises Busy beyond `most` callers, and for one that
    has waited for `seconds`."""

    def __init__(self, most: int, at_once: int, seconds: float) -> None:
        self.most, self.seconds, self.inside = most, seconds, 0
        self._slots = asyncio.Semaphore(at_once)

    async def __aenter__(self) -> None:
        if self.inside >= self.most:
            raise Busy
        self.inside += 1
        try:
            await asyncio.wait_for(self._slots.acquire(), self.seconds)
        except TimeoutError:
            self.inside -= 1
            raise Busy from None
        except BaseException:
            self.inside -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()
        self.inside -= 1


class Room:
    """Bytes that may be in memory at a time, of all who take some."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Return a context in which bytes may be taken, as they come, until it ends. Taking more than there is room for
        raises Busy."""
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self.taken + count > self.most:
                raise Busy
            self.taken += count
            mine += count

        try:
            yield take
        finally:
            self.taken -= mine
