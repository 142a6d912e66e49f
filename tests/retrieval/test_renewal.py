"""A server whose index changes on disk answers from what is there now, or says that it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from cmgan_dist.retrieval.index import Index
from cmgan_dist.retrieval.renewal import Renewal
from tests.retrieval.embeddings_cases import make_embeddings
from tests.retrieval.serve_cases import HueModel, colour, error_of, on_circle, running

HUES = np.stack([on_circle(i / 8) for i in range(8)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_embeddings(tmp_path / "emb", [(4, 4)], vectors=HUES)
    return Index.build(made.folder, tmp_path / "index").folder


@pytest.fixture
def client(folder: Path) -> Iterator[httpx2.Client]:
    served = running(Index.open(folder), HueModel(), renewal=Renewal(folder))
    with served as address, httpx2.Client(base_url=address, timeout=30) as client:
        yield client


def found(client: httpx2.Client, **parameters: object) -> list[str]:
    answer = client.get("/api/search", params={"text": "red", "k": 50, **parameters})
    assert answer.status_code == 200, answer.text
    return sorted({hit["key"] for hit in answer.json()["hits"]})


def test_what_is_added_and_removed_is_served_at_once(client: httpx2.Client, folder: Path, tmp_path: Path) -> None:
    assert found(client) == ["train0-0", "train0-1", "train0-2", "train0-3"]
    picture = client.post("/api/search", files={"image": colour(0.1)}).json()["query"]["picture"]
    changed = Index.open(folder)
    changed.remove(["train0-1"])
    assert found(client) == ["train0-0", "train0-2", "train0-3"]
    changed.add(make_embeddings(tmp_path / "more", [(2, 2)], vectors=HUES[:4], prefix="new").folder)
    assert client.get("/api/info").json()["counts"] == {"image": 5, "text": 5}
    assert found(client) == ["new0-0", "new0-1", "train0-0", "train0-2", "train0-3"]
    assert client.get("/api/browse").json()["total"] == 10
    known = client.get("/api/search", params={"picture": picture})
    assert known.status_code == 200, "a picture that was searched with is forgotten"
    Index.build(make_embeddings(tmp_path / "other", [(1, 1)], vectors=HUES[:2], prefix="only").folder, folder)
    assert found(client) == ["only0-0"]
    assert error_of(client.get("/api/similar/7"), 404)


def test_what_cannot_be_served_is_said_until_it_can(
    client: httpx2.Client, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    other = make_embeddings(tmp_path / "other", [(1, 1)], vectors=HUES[:2], model="cd" * 32)

    def damaged() -> None:
        (folder / "index.json").write_text("{")

    def gone() -> None:
        (folder / "index.json").unlink()

    def of_another_model() -> None:
        Index.build(other.folder, folder)

    reasons = [
        "index.json cannot be read",
        "index.json does not exist",
        "is of another model now: start the server again",
    ]
    for change, reason in zip((damaged, gone, of_another_model), reasons, strict=True):
        caplog.clear()
        change()
        for path in ("/api/search?text=red", "/api/browse", "/api/info", "/api/similar/0", "/api/thumbnail/0", "/"):
            said = error_of(client.get(path), 503)
            assert said == "the index has changed and cannot be used now: the log of the server says why"
        assert len([line for line in caplog.messages if reason in line]) == 1, caplog.text
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    assert found(client) == ["train0-0", "train0-1", "train0-2", "train0-3"]
