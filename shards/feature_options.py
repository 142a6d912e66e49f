"""The options of `python -m shards features`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass
class FeatureOptions:
    """What `python -m shards features` is asked for."""

    data: tyro.conf.Positional[str]
    """Folder or URL with manifest.json and tars."""
    output: str
    """Folder or URL (s3, gs) for the feature shards and their manifest.json."""
    image_backbone: str = "features"
    """timm model for the images, such as tf_efficientnet_lite0, or a tower of open_clip, such as open_clip:ViT-B-32;
    "features" copies them as they are."""
    image_weights: str = ""
    """"hub", a .pth or .safetensors file, or "package:NAME" for weights in a package; of open_clip "hub:TAG", a file or
    a folder."""
    image_size: int | None = None
    """Side of the square that the image backbone sees, in pixels (None: what the model is made for, of one that takes
    any 224)."""
    text_backbone: str = "features"
    """"sentence" for a sentence-transformers model, or a tower of open_clip, such as open_clip:ViT-B-32; "features"
    copies the texts as they are."""
    text_weights: str = ""
    """Folder of the model, "hub:NAME" or "package:NAME"; of open_clip as for images."""
    text_pool: str = "sentence"
    """What of a text's tokens makes its feature, with commas between: "sentence" as the model itself pools them, "max"
    over the tokens, "cls" the first token. sentence,max,cls finds more of the right pictures."""
    max_tokens: int | None = None
    """Longer texts are cut (None: at 64 tokens, of open_clip at as many as the model takes)."""
    batch_size: int = 64
    """Samples that go through a backbone at a time; each shard starts its own batches."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored features."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbones run; auto takes a GPU if there is one."""
    processes: int | None = None
    """Processes, each with a shard at a time (None: one a core, on a GPU one). The bytes do not depend on it."""
    task: str = ""
    """I/N: every N-th shard from I on, where several machines share the work and --output; a SLURM array and torchrun
    say it by themselves. Whoever finds all shards made writes the manifest."""
    ray: str = ""
    """Ray cluster whose machines do the work, a GPU or a CPU a process: its HOST:PORT, or auto on a machine of it.
    Data, weights and --output must be there under the same paths."""
    skip_bad: bool = False
    """Leave bad samples out, count and list them, instead of stopping at the first."""
    overwrite: bool = False
    """Make shards anew that came from other data or other options, and remove those that have no source."""
