"""A CLIP-family model that is small enough for tests, made and stored by open_clip itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
ARCHITECTURE: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
NAME = "cmgan-tiny"
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


def stored_clip(folder: Path, seed: int = 0) -> tuple[Path, Any]:
    """Write a model with drawn weights as open_clip's folders are; return the folder and the model itself.

    The model's name is known to open_clip in this process too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(seed)
    model = open_clip.create_model(NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")
    described = {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder, model.eval()
