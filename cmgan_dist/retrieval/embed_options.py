"""What the job that embeds is told; importing it imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass
class EmbedOptions:
    """Embed a data set, a folder of pictures or a file of texts with RUN's best generator.

    An interrupted job goes on where it was. Several may share the work: processes of this machine, torchrun's, the
    tasks of a SLURM array, machines that are told --task I/N, or a Ray cluster; the last to end writes
    embeddings.json."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or a copy of its best/."""
    output: str
    """Folder or URL for the embeddings."""
    data: str = ""
    """Folder or URL of shards, raw or of features that the run takes."""
    pictures: str = ""
    """Folder of .jpg, .png and .webp files without texts, in place of --data."""
    texts: str = ""
    """File with a text a line, or .jsonl with "key" and "text", in place of --data."""
    splits: str = ""
    """Splits of the data, such as train,test; all when left out."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    batch: int | None = None
    """Samples embedded at a time (None: as many as an evaluation of the run). The last bits depend on it."""
    task: str = ""
    """I/N: embed every N-th shard from shard I on, I from 0 to N - 1. A SLURM array and torchrun say it themselves."""
    ray: str = ""
    """Ray cluster whose machines do the work, a GPU or a CPU a process: its HOST:PORT, or auto on a machine of it. RUN,
    the data and --output must be there under the same paths."""
    finish: bool = False
    """Embed nothing: check what all tasks have written and write embeddings.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    processes: int | None = None
    """Processes, each with a shard at a time (None: one a core, on a GPU one). The bytes do not depend on it."""
    skip_bad: bool = False
    """Leave bad samples out, count and list them, instead of stopping at the first."""
    overwrite: bool = False
    """Replace embeddings of another model, of other data or with other options that are in --output."""
