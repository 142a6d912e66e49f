"""Where somebody who searches waits: launchers/search.py from the shell, and the page from a query to its pictures.

    python -m bench.wait INDEX [--rounds 7]

The shell: processor and wall time of `launchers/search.py` from its start to the table, for a text and a picture, by
the index's query encoders and by the run (--run), and beside it importing torch alone, and with the libraries of the
run's backbones, which the latter cannot do without. The page:
`launchers/serve.py` with a headless Chromium (/usr/bin/chromium, or --chromium) on the same machine; wall time from
Enter until every picture of the first screen is decoded, for words that were not asked before ("new") and for the same
words again ("again", where the server has the thumbnails), and what the API alone takes for the same.

Writes bench/results/wait.json.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from bench.common import spread, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.errors import BadInput, run_main
from cmgan_dist.retrieval.index import Index

WORDS = (
    "red heart",
    "a dog",
    "flag of a country",
    "something to eat",
    "musical instrument",
    "rain",
    "a train",
    "clock",
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
SHOWN = """() => {
  const all = [...document.querySelectorAll("#pictures img")];
  const seen = all.filter((e) => e.getBoundingClientRect().top < innerHeight);
  return seen.length > 0 && seen.every((e) => e.complete && e.naturalWidth > 0);
}"""
"""Whether all pictures that a person sees without scrolling are there."""


@dataclass
class Arguments:
    """Time searching as a person meets it."""

    index: Annotated[Path, tyro.conf.Positional]
    """Folder of an index whose run and raw pictures are still there."""
    rounds: Count = 7
    """Starts of each command."""
    chromium: str = "/usr/bin/chromium"
    """Browser."""
    name: str = "wait"
    """Of the results file in bench/results/."""


def started(command: list[str]) -> dict[str, float]:
    """Run a command; return seconds of processor and wall time. Raises BadInput when it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise BadInput(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return {"cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall_s": wall}


def shell(index: Path, picture: Path, rounds: int) -> dict[str, Any]:
    """Return the spread of each command's times over the rounds, in which they take turns."""
    search = [sys.executable, "launchers/search.py", str(index)]
    run = ["--run", Index.open(index).manifest.model["run"]]
    commands = {
        "search.py, a text": [*search, WORDS[0]],
        "search.py, a picture": [*search, "--image", str(picture)],
        "search.py --run, a text": [*search, WORDS[0], *run],
        "search.py --run, a picture": [*search, "--image", str(picture), *run],
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, sentence_transformers": [sys.executable, "-c", "import torch, sentence_transformers"],
        "import torch, timm": [sys.executable, "-c", "import torch, timm"],
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            took = started(command)
            if number:  # the first reads the disk
                times[name].append(took)
    return {n: {c: spread([t[c] for t in found]) for c in ("cpu_s", "wall_s")} for n, found in times.items()}


def page(address: str, chromium: str) -> dict[str, Any]:
    """Return milliseconds of wall time from Enter to pictures, and of the API alone."""
    from playwright.sync_api import sync_playwright

    def api(words: str) -> float:
        start = time.perf_counter()
        with urllib.request.urlopen(f"{address}/api/search?{urllib.parse.urlencode({'text': words})}") as answer:
            answer.read()
        return 1e3 * (time.perf_counter() - start)

    api("warm")
    times: dict[str, list[float]] = {"new": [], "again": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for name in times:
            tab = browser.new_context(viewport={"width": 1280, "height": 844}).new_page()  # nothing in its cache
            tab.goto(address)
            tab.locator("#results:not([aria-busy])").wait_for(state="attached")
            box = tab.get_by_role("searchbox", name="Words to search with")
            for words in WORDS:
                box.fill(words)
                start = time.perf_counter()
                with tab.expect_response(re.compile("/api/search")):
                    tab.keyboard.press("Enter")
                tab.locator("#results:not([aria-busy])").wait_for(state="attached")
                tab.wait_for_function(SHOWN)
                times[name].append(1e3 * (time.perf_counter() - start))
        browser.close()
    return {f"{name}, ms": spread(found) for name, found in times.items()} | {
        "API alone, ms": spread([api(words) for words in WORDS])
    }


def show(record: dict[str, Any]) -> None:
    table = Table(title="median (least to most)", title_justify="left")
    for column in ("", "processor s", "wall s"):
        table.add_column(column, justify="right" if column else "left")
    for name, clocks in record["shell"].items():
        table.add_row(name, *(f"{c['median']:.2f} ({c['min']:.2f} to {c['max']:.2f})" for c in clocks.values()))
    for name, found in record["page"].items():
        table.add_row(f"page: {name}", "", f"{found['median']:.0f} ({found['min']:.0f} to {found['max']:.0f})")
    Console(width=110).print(table)


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.wait")
    if shutil.which(arguments.chromium) is None:
        raise BadInput(f"--chromium {arguments.chromium} is no program: name the browser Chromium")
    index = Index.open(arguments.index)
    if index.query_encoder("text") is None:
        raise BadInput(
            f"{arguments.index} has no query encoders: launchers/index.py {arguments.index} --query-encoders"
        )
    command = [sys.executable, "launchers/serve.py", str(arguments.index), "--port", "0"]
    with TemporaryDirectory() as folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        picture = Path(folder) / "query"
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            if not address:
                raise BadInput("the server did not start: see above")
            pages = page(address, arguments.chromium)
            first = index.search(index.vector(int(index.items.ids[0])), 1, modality="image")[0][0]
            with urllib.request.urlopen(f"{address}/api/thumbnail/{first.id}") as answer:
                picture.write_bytes(answer.read())
        finally:
            server.terminate()
        server.wait()
        record: dict[str, Any] = {"rounds": arguments.rounds, "items": len(index)}
        record |= {"shell": shell(arguments.index, picture, arguments.rounds), "page": pages}
    show(record)
    print(write_results(arguments.name, record))


if __name__ == "__main__":
    run_main(main)
