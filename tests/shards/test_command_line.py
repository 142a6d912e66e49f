"""Wrong arguments and wrong data end as one sentence; every command explains itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput, run_main
from shards.__main__ import COMMANDS, SOURCES, main
from tests.toy import ROOT, fill_folder, img2dataset, picture, run_shards, table_rows, write_members, write_table


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence with which a command ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run_shards(*args))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "name a command: build, verify, stats, index, split, features"),
        (["pack"], "unknown command 'pack'"),
        (["build"], "name a source: openmoji"),
        (["build", "imagenet"], "unknown source 'imagenet'"),
        (["build", "openmoji"], "--output"),
        (["build", "folder", "nowhere", "--output", "o", "--shuffle"], "--shuffle"),
        (["build", "folder", "nowhere", "--output", "o", "--shard-samples", "many"], "--shard-samples"),
        (["build", "folder", "nowhere", "--output", "o"], "nowhere does not exist"),
        (["build", "folder", "nowhere", "--output", "o", "--shard-samples", "0"], "must be positive"),
        (["build", "flickr8k", "--input", "nowhere", "--output", "o"], "captions.tsv does not exist"),
        (["build", "wikipedia", "--input", "nowhere", "--output", "o"], "categories.list does not exist"),
        (["build", "table", "nowhere.csv", "--output", "o"], "table nowhere.csv does not exist"),
        (["build", "table", "nowhere.xlsx", "--output", "o"], "not a table that can be read"),
        (["verify", "nowhere"], "data folder nowhere does not exist"),
        (["stats", "nowhere"], "data folder nowhere does not exist"),
        (["index", "nowhere"], "folder nowhere does not exist"),
        (["verify"], "required"),
    ],
)
def test_wrong_arguments_end_as_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_end_as_one_sentence(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error() -> str:
        return error_of(capsys, "build", "folder", raw, "--output", tmp_path / "out", "--processes", 1)

    image, text = raw / "train/cat/train05.png", raw / "train/cat/train05.txt"
    good = image.read_bytes()
    image.write_bytes(good[:-30])
    assert "train05.png: the image does not decode" in error()
    image.write_bytes(b"")
    assert "train05.png: the image does not decode" in error()
    image.write_bytes(picture(1, kind="GIF"))
    assert "train05.png: the image does not decode (unknown format: expected JPEG, PNG or WebP)" in error()
    image.unlink()
    assert "train05.txt has no image of the same name" in error()
    image.write_bytes(good)
    text.write_text("")
    assert "train05.png: the text is empty" in error()
    text.unlink()
    assert "train05.txt cannot be read (No such file or directory)" in error()
    text.write_bytes(b"caf\xe9")
    assert "train05.png: the text is not UTF-8" in error()
    text.write_text("fine")
    shutil.copy(image, raw / "train/cat/train05.jpg")
    assert "has the same key 'train/cat/train05' as" in error()
    (raw / "train/cat/train05.jpg").unlink()
    shutil.rmtree(raw / "test/cat")
    shutil.rmtree(raw / "test/dog")
    assert not (tmp_path / "out/manifest.json").exists()
    assert list((tmp_path / "out").glob("*.tmp")) == []


def test_splits_without_samples_end_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill_folder(tmp_path / "raw", ["only"])
    build = ("build", "folder", tmp_path / "raw", "--output", tmp_path / "out", "--processes", 1)
    assert "has no samples" in error_of(capsys, *build)
    assert "must be shares" in error_of(capsys, *build, "--val", 0.6, "--test", 0.6)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in error_of(capsys, "build", "folder", tmp_path / "empty", "--output", tmp_path / "out")
    (tmp_path / "raw/class").mkdir()
    shutil.copy(tmp_path / "raw/only.png", tmp_path / "raw/class/b.png")
    assert "stands beside the class folder 'class'" in error_of(capsys, *build)
    (tmp_path / "file").write_text("")
    build = (
        "build",
        "folder",
        fill_folder(tmp_path / "good", list("abcdef")),
        "--output",
        tmp_path / "file",
        "--val",
        0,
    )
    assert "file is a file: name another folder" in error_of(capsys, *build, "--test", 0, "--processes", 1)


def test_wrong_tables_end_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table_rows(tmp_path)
    table = tmp_path / "t.csv"

    def error(change: int, **cells: str) -> str:
        changed = [{**row, **cells} if i == change else row for i, row in enumerate(rows)]
        write_table(table, changed)
        return error_of(capsys, "build", "table", table, "--output", tmp_path / "out", "--processes", 1)

    assert "row 4 of t.csv: " in (message := error(2, filepath="img/lost.png"))
    assert "img/lost.png cannot be read (No such file" in message
    assert "row 4 of" in (message := error(2, caption="  "))
    assert "has no text (column 'caption')" in message
    assert "row 4 of" in (message := error(2, label=""))
    assert "has no label" in message
    assert "has no split (column 'split', or --split-column '' to do without)" in error(2, split="")
    assert "may hold only letters" in error(2, split="../up")
    assert "has no image path" in error(2, filepath="")
    assert "row 12 of" in (message := error(10, label="a"))
    assert "has another label or split than row 2" in message
    table.write_bytes("filepath,caption\nimg/0.png,caf\xe9\n".encode("latin-1"))
    build = ("build", "table", table, "--output", tmp_path / "out")
    assert "t.csv is not UTF-8" in error_of(capsys, *build)
    table.write_text("filepath,words\nimg/0.png,x\n")
    assert "name it with --text-column" in error_of(capsys, *build)
    assert "has no column 'nope'" in error_of(capsys, *build, "--text-column", "nope")
    table.write_text("filepath,caption\n")
    assert "has no rows" in error_of(capsys, *build)
    (tmp_path / "t.jsonl").write_text('{"image": "img/0.png", "text": "x"}\n{"image": ')
    assert "row 2 of" in error_of(capsys, "build", "table", tmp_path / "t.jsonl", "--output", tmp_path / "out")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert "Parquet" in error_of(capsys, "build", "table", tmp_path / "t.parquet", "--output", tmp_path / "out")


def test_wrong_tars_and_manifests_end_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    assert "holds no .tar files" in error_of(capsys, "index", tmp_path / "none")
    assert "has no manifest.json" in error_of(capsys, "verify", tmp_path / "none")
    write_members(tmp_path / "empty/0.tar", {})
    assert "0.tar has no samples" in error_of(capsys, "index", tmp_path / "empty", "--processes", 1)
    write_members(tmp_path / "bad/0.tar", {"a.txt": b"x"})
    assert "no sample in" in error_of(capsys, "index", tmp_path / "bad", "--processes", 1)
    folder = img2dataset(tmp_path / "good")
    run_shards("index", folder, "--processes", 1)
    assert "exists already" in error_of(capsys, "index", folder, "--processes", 1)
    assert "--processes is 0" in error_of(capsys, "verify", folder, "--processes", 0)
    cut_tar = folder / "00001.tar"
    cut_tar.write_bytes(cut_tar.read_bytes()[:1000])
    assert "00001.tar is truncated" in error_of(capsys, "stats", folder, "--processes", 1)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json is not a manifest" in error_of(capsys, "stats", folder)


@pytest.mark.process
def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shards", *args], cwd=ROOT, capture_output=True, text=True, check=False
        )

    wrong = command("verify", str(tmp_path / "nowhere"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: data folder")
    assert wrong.stderr.count("\n") == 1
    usage = command("--help")
    assert usage.returncode == 0
    for name in [*SOURCES, *COMMANDS]:
        assert name in usage.stdout


@pytest.mark.parametrize(
    "args", [["build", name] for name in SOURCES] + [[name] for name in COMMANDS if name != "features"]
)
def test_every_command_explains_its_flags(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--help"])
    assert not stop.value.code
    assert "--processes" in capsys.readouterr().out


SIGNED = "http://user:SECRET@127.0.0.1:9/d?X-Amz-Signature=SECRET"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["build", "folder", SIGNED, "--output", "o"], "INPUT"),
        (["build", "coco", SIGNED, "--images", "i", "--output", "o"], "INPUT"),
        (["build", "coco", "c.json", f"--images={SIGNED}", "--output", "o"], "--images"),
    ],
)
def test_a_url_in_place_of_a_path_is_refused_unshown(
    args: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, *args)
    assert error.startswith(f"error: {named} is a URL where only a path on this machine")
    assert "SECRET" not in error


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_no_sentence_shows_what_is_secret_in_a_url(slashes: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise BadInput(
            f"https:{slashes}user:SECRET@host/d?Signature=SECRET&b=1,SECRET: restore it, see s3:{slashes}b/c"
        )

    with pytest.raises(SystemExit):
        run_main(fail)
    assert capsys.readouterr().err == f"error: https:{slashes}host/d: restore it, see s3:{slashes}b/c\n"


@pytest.mark.parametrize("protocol", ["file", "File"])
def test_the_url_of_a_file_works_as_its_path_everywhere(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    for i in range(4):
        (tmp_path / "a b" / f"{i}.png").write_bytes(picture(i))
    write_table(tmp_path / "a b" / "t.jsonl", [{"image": f"{i}.png", "text": f"text {i}"} for i in range(4)])
    url = f"{protocol}://{tmp_path}"
    monkeypatch.chdir(tmp_path)
    one = ["--processes", 1]
    run_shards("build", "table", f"{url}/a%20b/t.jsonl", f"--output={url}/out%20put", "--val", 0, "--test", 0, *one)
    assert run_shards("verify", f"{url}/out%20put", *one) in (None, 0)
    run_shards("split", f"{url}/out%20put", "--val", 0.25, "--output", f"{url}/new", *one)
    run_shards("stats", f"{url}/new", "--picture", f"{url}/grid.png", "--columns", 2, "--rows", 1, *one)
    run_shards("index", f"{url}/new", "--overwrite", *one)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {"a b", "out put", "new", "grid.png"}
    with pytest.raises(BadInput, match=f"{protocol}://host/x names a file of another machine: write file:///PATH"):
        main(["verify", f"{protocol}://host/x"])
