"""Seconds to the first batch of a data set that is read from a URL for the first time.

    python -m bench.first_batch [--streams 16] [--latency-ms 50] [--rounds 5]

A server on loopback answers each request after a while, as one far away does. Its shards hold features, so that what is
measured is waiting. In every round a process of its own, with an empty cache, reads a batch of which every logical
stream needs a shard; `warm` is a second process, which finds the shards in the cache. The requests are counted: more
than a manifest, and a sidecar and a tar of each shard that is needed, would be waste. Writes
bench/results/first_batch.json.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import http.server
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from bench.common import spread, write_results
from bench.stream_data import build_features
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import BadInput, run_main

CHILD = """
import sys, time
from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.stream import Stream
import aiohttp, fsspec.implementations.http
url, cache, streams = sys.argv[1:]
config = StreamConfig(global_batch=4 * int(streams), logical_streams=int(streams), window=1, cache=cache, workers=0)
began = time.perf_counter()
next(Stream(url, config, seed=0).batches(0))
print(time.perf_counter() - began)
"""


@dataclass
class Arguments:
    """Time the first batch from a URL and write bench/results/first_batch.json."""

    streams: Annotated[int, Range(1, 10000)] = 16
    """Logical streams."""
    latency_ms: Annotated[float, Range(0, 20000)] = 50.0
    """Milliseconds after which a request is answered."""
    rounds: Count = 5
    """Rounds, each with an empty cache."""
    work: Path = Path("runs/bench-first-batch")
    """Where the data is built."""
    name: str = "first_batch"
    """Of the results file in bench/results/."""


class Server:
    """A folder by HTTP, late."""

    def __init__(self, folder: Path, latency_s: float) -> None:
        self.requests: collections.Counter[str] = collections.Counter()
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                requests[self.path] += 1
                time.sleep(latency_s)
                with contextlib.suppress(BrokenPipeError):  # a process ended before what it asked for in advance came
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def time_batch(url: str, cache: str, streams: int) -> float:
    """Return the seconds that a process of its own waits. Raises BadInput when it fails."""
    words = [sys.executable, "-c", CHILD, url, cache, str(streams)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BadInput("a process ended without an answer: its traceback is above")
    return float(done.stdout)


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.first_batch")
    place = arguments.work / str(arguments.streams)
    build_features(place, shards=2 * arguments.streams, samples=256)
    server = Server(place / "shards", arguments.latency_ms / 1000)
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    asked: list[tuple[int, int]] = []
    for _ in range(arguments.rounds):
        server.requests.clear()
        with tempfile.TemporaryDirectory() as cache:
            for found in times.values():
                found.append(time_batch(server.url, cache, arguments.streams))
                asked.append((server.requests.total(), max(server.requests.values())))
    record: dict[str, Any] = {name: spread(found) for name, found in times.items()}
    table = Table(title=f"seconds to the first batch, {arguments.streams} logical streams", title_justify="left")
    for column in ("", "median", "min", "max"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in record.items():
        table.add_row(name, *(f"{found[each]:.2f}" for each in ("median", "min", "max")))
    Console(width=100).print(table)
    options = {"streams": arguments.streams, "latency_ms": arguments.latency_ms, "rounds": arguments.rounds}
    record = {**options, **record, "requests_cold": asked[0][0], "most_of_one_file_cold": asked[0][1]}
    print(f"written to {write_results(arguments.name, record)}")


if __name__ == "__main__":
    run_main(main)
