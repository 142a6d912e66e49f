"""A headless Chromium of Debian's, driven by playwright; nothing is downloaded from playwright's own hosts."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PROGRAM = "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def install() -> str:
    """Install Chromium where it is missing; "" or why it cannot be had."""
    if os.path.exists(PROGRAM):
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{PROGRAM} is not installed, and there is no apt-get or not the right to use it"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(Path(tempfile.gettempdir()) / "cmgan-dist-browser-install", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's processes install one after the other; the second finds it done
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            if os.path.exists(PROGRAM):
                return ""
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=400, check=False
            )
            if done.returncode:
                return f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return ""


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Start a browser. Skips where `install` says why there can be none."""
    missing = install()
    if missing:
        pytest.skip(f"no browser: {missing}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=list(FLAGS))
        yield browser
        browser.close()
