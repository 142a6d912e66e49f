"""Data sets at a URL: built, split, verified and looked at there; the bytes are those of a folder."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from shards.plan_files import PLAN_NAME
from tests.services.faulty_server import FaultyServer
from tests.services.object_store import running_gs, running_s3
from tests.toy import ROOT, environment, files_of, picture, run_shards, wait_for, write_table

pytestmark = pytest.mark.process


@pytest.fixture
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, of S3 unless the test names the other protocol."""
    protocol = getattr(request, "param", "s3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with {"s3": running_s3, "gs": running_gs}[protocol]("bucket"):
        yield f"{protocol}://bucket"


BOTH = pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)


def make_table(folder: Path, rows: int = 40, side: int = 24) -> Path:
    told = [
        {"image": {"bytes": picture(i, side), "path": None}, "text": f"t {i}", "label": "ab"[i % 2]}
        for i in range(rows)
    ]
    return write_table(folder / "t.parquet", told)  # type: ignore[arg-type]


def build(table: Path, output: Path | str, *more: object) -> None:
    options = ("--shard-samples", 8, "--processes", 1, "--val", 0.2, "--test", 0)
    run_shards("build", "table", table, "--output", output, *options, *more)


def files(url: str) -> dict[str, bytes]:
    store = FileStore(url, "URL")
    return {name: store.read(name) for name in store.names()}


@BOTH
def test_what_is_built_at_a_url_is_what_is_built_in_a_folder(
    tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table, url = make_table(tmp_path), f"{bucket}/out"
    build(table, tmp_path / "local")
    whole = files_of(tmp_path / "local")
    build(table, url)
    assert files(url) == whole
    assert f"packed {url}" in capsys.readouterr().out
    assert not list((tmp_path / "cache/cmgan_dist/plans").iterdir())
    store = FileStore(url, "URL")
    name = next(name for name in whole if name.endswith(".tar"))
    store.write(name, whole[name][:-1] + b"x")
    store.remove("manifest.json")
    store.write(".packing", "of a run that was killed")
    build(table, url)
    assert f"{url}/{name} or its sidecar is not what its record says: it is made anew" in capsys.readouterr().out
    assert files(url) == whole
    store.write(".packing", "of a run that was killed behind its manifest")
    build(table, url)
    assert f"already packed: {url}" in capsys.readouterr().out
    assert files(url) == whole
    with pytest.raises(BadInput, match=r"://bucket/out holds another data set: name a new place, or pass --over"):
        build(make_table(tmp_path, 30), url)
    assert files(url) == whole
    build(make_table(tmp_path, 30), url, "--overwrite")
    build(make_table(tmp_path, 30), tmp_path / "other")
    assert files(url) == files_of(tmp_path / "other")


def at_once(bucket: str, *tables: Path) -> list[subprocess.Popen[str]]:
    """Build all tables at one place at the same time; what has ended."""
    words = [sys.executable, "-m", "shards", "build", "table", "--output", f"{bucket}/out", "--processes", "1"]
    words += ["--shard-samples", "8", "--val", "0.2", "--test", "0"]
    started = [
        subprocess.Popen([*words, str(table)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
        for table in tables
    ]
    for one in started:
        one.wait(120)
    return started


def test_two_equal_builds_at_once_make_one_data_set(tmp_path: Path, bucket: str) -> None:
    table = make_table(tmp_path)
    build(table, tmp_path / "local")
    assert [one.returncode for one in at_once(bucket, table, table)] == [0, 0]
    assert files(f"{bucket}/out") == files_of(tmp_path / "local")


def test_of_two_other_builds_at_once_one_is_refused(tmp_path: Path, bucket: str) -> None:
    tables = []
    for rows in (40, 30):
        (tmp_path / str(rows)).mkdir()
        tables.append(make_table(tmp_path / str(rows), rows))
        build(tables[-1], tmp_path / str(rows) / "local")
    ended = at_once(bucket, *tables)
    assert sorted(one.returncode for one in ended) == [0, 2]
    wrong = 0 if ended[0].returncode else 1
    assert ended[wrong].stderr is not None
    assert re.search(r"error: .*s3://bucket/out.*", ended[wrong].stderr.read().splitlines()[-1])
    assert files(f"{bucket}/out") == files_of(tables[1 - wrong].parent / "local")


@pytest.mark.parametrize("shared", [True, False])
def test_tasks_at_a_url_agree_with_a_shared_plan_and_without(shared: bool, tmp_path: Path, bucket: str) -> None:
    table, url, work = make_table(tmp_path), f"{bucket}/out", tmp_path / "work"
    words = ("--work", work) if shared else ()
    build(table, url, "--task", "1/2", *words)
    assert len(list(work.glob(f"*/.plan-*/{PLAN_NAME}"))) == shared
    assert "manifest.json" not in files(url)
    build(table, url, "--task", "0/2", *words)
    build(table, tmp_path / "local")
    assert files(url) == files_of(tmp_path / "local")
    assert not list(work.glob("*"))


def test_what_a_task_made_of_pictures_that_changed_is_made_anew(tmp_path: Path, bucket: str) -> None:
    """Each task has made a plan of its own, so nothing but the pictures tells."""
    told = [{"image": f"{i}.png", "text": f"t {i}"} for i in range(20)]
    table, url = write_table(tmp_path / "t.jsonl", told), f"{bucket}/out"
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    build(table, url, "--task", "0/2")
    for i in range(20):  # behind what is decoded: no size and no split changes
        data = (tmp_path / f"{i}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes(data[:-1] + b"?")
    build(table, url, "--task", "1/2")
    assert "manifest.json" not in files(url)
    build(table, url, "--task", "0/2")
    build(table, tmp_path / "local")
    assert files(url) == files_of(tmp_path / "local")


def test_any_file_system_of_fsspec_is_written_and_a_file_url_is_a_folder(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    build(table, tmp_path / "local")
    build(table, "memory://place/out")
    assert files("memory://place/out") == files_of(tmp_path / "local")
    build(table, f"file://{tmp_path}/folder")
    assert files_of(tmp_path / "folder") == files_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("https://me:secret@host/out",), r"--output https://host/out cannot be written by https: name a folder"),
        (("s3://nowhere/out",), r"--output s3://nowhere/out cannot be written .*there is no such bucket"),
        (("s3://bucket/out", "--ray", "auto"), r"--ray with --output s3://bucket/out needs .* name it by --work"),
        (("folder", "--work", "w"), r"--work is for an --output that is a URL, which \S+ is not: leave it away"),
    ],
)
def test_what_cannot_be_is_said(
    words: tuple[str, ...], sentence: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=sentence) as refused:
        build(make_table(tmp_path), *words)
    assert "secret" not in str(refused.value)


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on(tmp_path: Path, bucket: str) -> None:
    table, url = make_table(tmp_path, 80, 600), f"{bucket}/out"
    words = [sys.executable, "-m", "shards", "build", "table", str(table), "--output", url, "--shard-samples", "8"]
    words += ["--processes", "1", "--val", "0.2", "--test", "0"]
    store = FileStore(url, "URL")
    begun = subprocess.Popen(words, cwd=ROOT, env=environment())
    wait_for(lambda: sum(name.endswith(".tar") for name in store.own_names()) >= 2, 120)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    left = store.own_names()
    assert "manifest.json" not in left
    build(table, url)
    build(table, tmp_path / "local")
    assert files(url) == files_of(tmp_path / "local")


@pytest.mark.slow
@BOTH
def test_a_cluster_builds_at_a_url_what_one_process_builds_in_a_folder(tmp_path: Path, bucket: str) -> None:
    from tests.services.ray_nodes import running_nodes

    table, url = make_table(tmp_path), f"{bucket}/out"
    build(table, tmp_path / "local")
    with running_nodes(2) as cluster:  # begun here, they ask the same store
        with pytest.raises(BadInput, match="needs a folder for the plan that all nodes see: name it by --work"):
            build(table, url, "--ray", cluster.address)
        build(table, url, "--ray", cluster.address, "--work", tmp_path / "work")
    assert files(url) == files_of(tmp_path / "local")


@BOTH
def test_a_data_set_at_a_url_is_split_verified_and_looked_at(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = make_table(tmp_path)
    build(table, "local", "--val", 0)
    build(table, f"{bucket}/raw", "--val", 0)
    options = ("--val", 0.3, "--processes", 1)
    run_shards("split", "local", "--output", "new", *options)
    run_shards("split", f"{bucket}/raw", "--output", f"{bucket}/new", *options)
    assert files(f"{bucket}/new") == files_of(tmp_path / "new")
    with pytest.raises(BadInput, match="is the data set itself"):
        run_shards("split", f"{bucket}/raw", "--output", f"{bucket}/raw/", *options)
    server = FaultyServer()
    server.files = {f"/d/{name}": data for name, data in files(f"{bucket}/new").items()}
    try:
        for place in (f"{bucket}/new", f"{server.url}/d"):
            assert run_shards("verify", place, "--processes", 1) == 0
            assert run_shards("stats", place, "--processes", 1) is None
        assert (tmp_path / "stats.png").stat().st_size
        sidecar, gone = (
            "/d/val-000000.index.npz",
            next(name for name in server.files if "train" in name and ".tar" in name),
        )
        server.files[sidecar] = server.files[sidecar][:-1] + b"?"
        del server.files[gone]
        capsys.readouterr()
        assert run_shards("verify", f"{server.url}/d", "--processes", 1) == 1
    finally:
        server.close()
    said = capsys.readouterr().out
    assert f"problem: {gone.removeprefix('/d/')} is in the manifest but not in the place" in said
    assert "problem: val-000000.index.npz" in said
    store = FileStore(f"{bucket}/new", "URL")
    store.write("val-000000.tar", store.read("val-000000.tar")[:-1] + b"?")
    store.write("train-000099.tar", b"")
    assert run_shards("verify", f"{bucket}/new", "--processes", 1) == 1
    said = capsys.readouterr().out
    assert "val-000000.tar has another checksum than the manifest says" in said
    assert "train-000099.tar is in the place but not in the manifest" in said
