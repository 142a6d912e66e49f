"""How long planning takes a row, and how much memory: a table of that many rows, pictures in it, splits drawn.

    python -m bench.plan --rows 10000000

The table is Parquet of 250,000 rows a file: one tiny picture with a number behind its end, so that all are unlike but
every hundredth, which is that of the row before it, as its text is. Writing it is not counted. Memory is the most that
the process and its workers had at once, resident or swapped (watched ten times a second)."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import pyarrow
import pyarrow.parquet
from PIL import Image

from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import run_main
from shards.pack import plan_in
from shards.sources.table import TableCommand

FILE_ROWS = 250_000
SIZES = (100_000, 1_000_000, 10_000_000)


def write_table(folder: Path, rows: int) -> None:
    """Files of FILE_ROWS rows each, written a batch at a time."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "PNG")
    folder.mkdir(parents=True)
    for start in range(0, rows, FILE_ROWS):
        with pyarrow.parquet.ParquetWriter(folder / f"rows-{start // FILE_ROWS:05d}.parquet", SCHEMA) as writer:
            for batch in range(start, min(start + FILE_ROWS, rows), 10_000):
                numbers = [n - (n % 100 == 99) for n in range(batch, min(batch + 10_000, rows, start + FILE_ROWS))]
                pictures = [{"bytes": out.getvalue() + n.to_bytes(8, "big"), "path": None} for n in numbers]
                texts = [f"a red square, the one with number {n}, seen from {n % 97} sides" for n in numbers]
                writer.write_batch(pyarrow.record_batch([pictures, texts], schema=SCHEMA))


SCHEMA = pyarrow.schema(
    [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])), ("text", pyarrow.string())]
)


@dataclass
class Memory:
    """The most bytes that this process and those below it had at once."""

    most: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Memory:
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        over = False
        while not over:
            over = self.ended.wait(0.1)  # what ends within that is looked at once, at its end
            total = 0
            for one in [me, *me.children(recursive=True)]:
                try:
                    memory = one.memory_full_info()
                    total += memory.rss + memory.swap
                except psutil.NoSuchProcess:
                    continue
            self.most = max(self.most, total)


def measure(folder: Path, rows: int, processes: int) -> dict[str, float]:
    """Plan a table of that many rows."""
    table, output = folder / "table", folder / "output"
    write_table(table, rows)
    memory_before = psutil.Process().memory_full_info()
    base = memory_before.rss + memory_before.swap
    command = TableCommand(input=str(table), output=str(output), processes=processes)
    begun, used = time.monotonic(), os.times()
    with Memory() as memory:
        plan = plan_in(folder / "plan", command)[1]
    seconds, now = time.monotonic() - begun, os.times()
    processor = sum(now[:4]) - sum(used[:4])
    disk = sum(path.stat().st_size for path in (folder / "plan").iterdir())
    return {
        "rows": rows,
        "samples": sum(shard.samples for shard in plan.shards),
        "shards": len(plan.shards),
        "seconds": round(seconds, 1),
        "us_a_row": round(seconds / rows * 1e6, 2),
        "processor_us_a_row": round(processor / rows * 1e6, 2),
        "peak_mib": memory.most >> 20,
        "before_mib": base >> 20,
        "disk_bytes_a_row": round(disk / rows, 1),
    }


@dataclass
class Arguments:
    """Plan tables of rising size and write bench/results/NAME.json."""

    rows: Count = SIZES[1]
    """Rows of the largest table; smaller ones come before it."""
    folder: Path = Path(tempfile.gettempdir())
    """Where a folder for the tables and their plans is made, and removed at the end."""
    processes: Annotated[int, Range(1, 4096)] = 1
    """Processes that read the tables."""
    name: str = "plan"
    """Of the results file."""


def main() -> None:
    """Measure each size in turn, up to --rows."""
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.plan")
    found = []
    for rows in [size for size in SIZES if size < arguments.rows] + [arguments.rows]:
        with tempfile.TemporaryDirectory(prefix="bench-plan-", dir=arguments.folder) as folder:
            found.append(measure(Path(folder), rows, arguments.processes))
        print(found[-1], flush=True)
    from bench.common import write_results  # with torch, whose memory is not that of a build

    print(write_results(arguments.name, {"processes": arguments.processes, "planned": found}))


if __name__ == "__main__":
    run_main(main)
