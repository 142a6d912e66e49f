"""A folder that a user names: each folder once, none left out in silence, and files that are files."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmgan_dist.data.folder import is_unicode, read_file, walk_files
from cmgan_dist.errors import BadInput, BadSample, shown

NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user may read, as whom the test goes on where it is root's."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o755)
        yield folder
        os.seteuid(user)


def become_nobody() -> None:
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


# ---------------------------------------------------------------------------------------------- walking


def test_what_has_an_ending_is_found_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "b/c/2.png", "b/1.JPG", "a.png", "b.txt", ".h/3.png", "b/.4.png", "e/none.md")
    assert walk_files(tmp_path, ("png", "jpg")) == ["a.png", "b/1.JPG", "b/c/2.png"]
    assert walk_files(tmp_path / "e", ("png",)) == []
    hidden: list[str] = []
    walk_files(tmp_path, ("png",), hidden=hidden)
    assert hidden == [".h/", "b/.4.png"]


def test_a_linked_folder_is_walked_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its own path, else by the first link, whatever leads to it; circles end."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root, "a/x.png", "b/y.png")
    touch(outside, "o.png", "inner/i.png")
    for link, target in {
        "a/tob": "../b",
        "b/toa": "../a",
        "b/up": "..",
        "first": "../outside/inner",
        "second": "../outside",
        "third": "../outside",
    }.items():
        (root / link).symlink_to(target)
    (outside / "back").symlink_to(root)
    assert walk_files(root, ("png",)) == ["a/x.png", "b/y.png", "first/i.png", "second/o.png"]
    said = [record.getMessage().replace(f"{root}/", "").partition(":")[0] for record in caplog.records]
    assert said == [
        "a/tob is the folder b",
        "b/toa is the folder a",
        f"b/up is the folder {root}",
        "second/inner is the folder first",
        f"second/back is the folder {root}",
        "third is the folder second",
    ]


def test_many_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(12)]
    touch(tmp_path, *(f"{name}/p.png" for name in names))
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert walk_files(tmp_path, ("png",)) == [f"{name}/p.png" for name in sorted(names)]


def test_links_that_lead_nowhere_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "disk").symlink_to(tmp_path / "gone")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "p.png").symlink_to("nowhere.png")  # its reader says so
    assert walk_files(tmp_path, ("png",)) == ["p.png"]
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" leads")[0] for line in said] == [str(tmp_path / "disk"), str(tmp_path / "self")]
    assert "(No such file or directory): it is left out" in said[0]


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_that_cannot_be_read_is_named(mode: int, shared: Path) -> None:
    touch(shared, "a.png", "closed/deep/b.png")
    (shared / "closed").chmod(mode)
    become_nobody()
    with pytest.raises(BadInput, match=r"folder .*/closed(/deep)? cannot be read \(Permission denied\): make it"):
        walk_files(shared, ("png",))


# ---------------------------------------------------------------------------------------------- reading


def test_only_regular_files_up_to_a_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "good")
    assert read_file(tmp_path / "good", 1) == b"x"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    (tmp_path / "large").write_bytes(bytes(2))
    (tmp_path / "endless").symlink_to("/proc/self/status")  # a regular file of 0 bytes that gives some
    assert read_file(tmp_path / "link") == b"x"
    for name, follow, said in (
        ("pipe", True, "is no regular file"),
        ("folder", True, "is no regular file"),
        ("device", True, "is no regular file"),
        ("socket", True, "is no regular file"),
        ("large", True, "has more than 0 MiB"),
        ("link", False, "cannot be read"),
        ("endless", True, "grows while it is read"),
        ("gone", True, r"cannot be read \(No such file or directory\)"),
    ):
        with pytest.raises(BadSample, match=said):
            read_file(tmp_path / name, 1, follow=follow)


def test_a_file_that_may_not_be_read_is_said(shared: Path) -> None:
    touch(shared, "closed")
    (shared / "closed").chmod(0)
    become_nobody()
    with pytest.raises(BadSample, match="Permission denied"):
        read_file(shared / "closed")


def test_names_are_shown_in_one_line(tmp_path: Path) -> None:
    assert shown("Bär 猫 \\n.png") == "Bär 猫 \\n.png"
    assert shown("a\nb\udcff\x1b[2J") == r"a\nb\udcff\x1b[2J"
    assert (is_unicode("Bär 猫 🐈"), is_unicode("a\udcff"), is_unicode("\ud800")) == (True, False, False)
