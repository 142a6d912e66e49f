"""Cross-modal GANs (Peng & Qi, TOMM 2019) trained on streams of image-text pairs, and put to use.

    import cmgan_dist

    cmgan_dist.train(config)                    # a Config, for example preset("openmoji") with data and output set
    cmgan_dist.evaluate("runs/mine")            # metrics of its best model on the test split
    model = cmgan_dist.load("runs/mine")        # a `Model`: encode_images, encode_texts, export, push_to_hub

Names are imported when they are first asked for (PEP 562): ``import cmgan_dist`` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmgan_dist.config.fields import Config as Config
    from cmgan_dist.config.presets import preset as preset
    from cmgan_dist.errors import BadInput as BadInput
    from cmgan_dist.retrieval.evaluate import evaluate as evaluate
    from cmgan_dist.retrieval.index import Index as Index
    from cmgan_dist.retrieval.model import Model as Model
    from cmgan_dist.retrieval.model import load_model as load
    from cmgan_dist.training.loop import train as train

__version__ = "0.1.0"
_PUBLIC = {
    "BadInput": "cmgan_dist.errors:BadInput",
    "Config": "cmgan_dist.config.fields:Config",
    "Index": "cmgan_dist.retrieval.index:Index",
    "Model": "cmgan_dist.retrieval.model:Model",
    "evaluate": "cmgan_dist.retrieval.evaluate:evaluate",
    "load": "cmgan_dist.retrieval.model:load_model",
    "preset": "cmgan_dist.config.presets:preset",
    "train": "cmgan_dist.training.loop:train",
}
__all__ = ["BadInput", "Config", "Index", "Model", "__version__", "evaluate", "load", "preset", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
