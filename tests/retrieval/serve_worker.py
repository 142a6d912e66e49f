"""launchers/serve.py over a stand-in index and model: the folder of pictures is its first argument."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cmgan_dist.errors import BadInput, run_main
from tests.retrieval.serve_cases import HueModel, hue_index


def stand_in(folder: Path) -> Any:
    """An index of pictures in `folder` that says which model made it."""
    index: Any = hue_index(folder, 12)
    index.manifest = SimpleNamespace(
        model={"run": str(folder)}, attribution="", embeddings=[{"source": index.source, "first_id": 0}]
    )
    index.source_of = lambda _: index.source

    def read_model(run: str) -> Any:
        if run == "other":
            raise BadInput("INDEX was made with another model than other: embed and index again")
        return SimpleNamespace(spec=SimpleNamespace(image=SimpleNamespace(image_size=32)))

    index.read_model = read_model
    return index


if __name__ == "__main__":
    found = stand_in(Path(sys.argv.pop(1)))
    modules = {
        "cmgan_dist.retrieval.index": SimpleNamespace(Index=SimpleNamespace(open=lambda _: found)),
        "cmgan_dist.retrieval.model": SimpleNamespace(Model=lambda _: HueModel()),
    }
    sys.modules.update(modules)  # type: ignore[arg-type]
    from launchers.serve import main

    run_main(main)
