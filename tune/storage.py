"""OUTPUT, a folder or a URL that fsspec knows: what the search writes itself, and the same for Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cmgan_dist.errors import BadInput


class Output:
    """`url`: a folder, or s3://..., gs://... and so on. On a cluster every node must reach it."""

    def __init__(self, url: str) -> None:
        try:
            self.fs, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise BadInput(
                f"--output {url} cannot be opened ({error}): use a folder or install what it needs"
            ) from None
        self.url, self.path = url, str(path).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str) -> str | None:
        """Text of a file, or None where there is none."""
        try:
            return self.fs.cat_file(self.at(name)).decode()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        """In one step: a reader sees the old file or the new one."""
        try:
            self.fs.makedirs(self.path, exist_ok=True)
            if self.local:
                aside = Path(self.at(f".{name}.tmp"))
                aside.write_text(text, encoding="utf-8")
                aside.replace(self.at(name))
            else:
                self.fs.pipe_file(self.at(name), text.encode())
        except OSError as error:
            raise BadInput(f"--output {self.url} cannot be written ({error}): use another place") from None

    def put(self, folder: Path, name: str) -> None:
        """Copy a local folder to OUTPUT/name."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            target = self.at(f"{name}/{file.relative_to(folder).as_posix()}")
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(file), target)

    def for_ray(self) -> dict[str, Any]:
        """storage_path and storage_filesystem of a RunConfig."""
        if self.local:
            return {"storage_path": self.path}
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return {"storage_path": self.path, "storage_filesystem": PyFileSystem(FSSpecHandler(self.fs))}
