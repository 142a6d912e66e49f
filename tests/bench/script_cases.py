"""The benchmarks that can be started."""

from __future__ import annotations

from tests.toy import ROOT

FILES = sorted((ROOT / "bench").rglob("*.py"))
SCRIPTS = {
    path.stem if path.parent.name == "bench" else path.parent.name: path
    for path in FILES
    if '"__main__"' in path.read_text(encoding="utf-8")
}
"""Name of a script, or of a package with a ``__main__.py`` -> its file."""
