"""A query -> its vector, by a file that `Model.export` wrote: without torch's libraries a search starts in a second.

An index may carry such a file for each modality (`Index.add_query_encoders`). Text goes through the tokeniser, or the
vocabulary, that the file's metadata holds.

Shapes: E dimensions of the common space, L tokens, S the side of a picture in pixels."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.inputs import pixels_of, text_of

if TYPE_CHECKING:
    from cmgan_dist.retrieval.model import Model

NEEDED = ("onnxruntime", "tokenizers")
"""Packages without which no file can be used."""


def missing_packages() -> list[str]:
    """Return which of NEEDED are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


class QueryEncoder:
    """One modality of a model, from raw queries to vectors."""

    def __init__(self, path: Path) -> None:
        """Read an ``.onnx`` file of a model with its backbone. Raises BadInput when it is none."""
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            facts: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
            self.inputs = [each.name for each in self.session.get_inputs()]
            self.modality = facts["modality"]
            if self.modality == "image":
                self.image_size = int(facts["image_size"])
            else:
                self.max_tokens = int(facts["max_tokens"])
                self._ids = _tokeniser(facts, self.max_tokens)
        except (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile, KeyError, ValueError) as error:
            raise BadInput(
                f"{path} is no exported model with its backbone ({error}): restore it, or name a run by --run"
            ) from None

    def encode_text(self, text: str) -> np.ndarray:
        """Return the vector float32 [1, E] of a text. Raises BadInput when it is empty."""
        ids = np.asarray([self._ids(text_of(text))], np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return self._run({name: given[name] for name in self.inputs})

    def encode_image(self, image: str | Path | bytes) -> np.ndarray:
        """Return the vector float32 [1, E] of a picture, a file or its bytes. Raises BadInput when it is none."""
        pixels = pixels_of(image, self.image_size)[..., :3]
        return self._run({"pixels": np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]})

    def _run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        (vectors,) = self.session.run(None, inputs)
        return np.asarray(vectors, np.float32)


def check_encoder(path: Path, model: Model, texts: Sequence[str]) -> None:
    """Compare an exported text encoder, tokeniser included, with its model. Raises BadInput where they differ."""
    from cmgan_dist.retrieval.export import TOLERANCE  # which imports torch; the model has done so

    encoder = QueryEncoder(path)
    for text in texts:
        difference = float(np.abs(encoder.encode_text(text) - model.encode_texts(text)).max())
        if not difference <= TOLERANCE:
            raise BadInput(
                f"the exported model encodes {text!r} otherwise than the model, by {difference:.1e}: an index of this "
                "model can have no query encoders"
            )


def _tokeniser(facts: dict[str, str], longest: int) -> Any:
    """Return what makes ids of a text, at most `longest`. Raises KeyError or ValueError at metadata without it."""
    if "vocabulary" in facts:
        from cmgan_dist.models.vocabulary import Vocabulary

        vocabulary = Vocabulary(json.loads(facts["vocabulary"])["words"])
        return lambda text: vocabulary.encode(text)[:longest]
    import tokenizers

    made = tokenizers.Tokenizer.from_str(facts["tokenizer"])
    made.no_padding()
    made.enable_truncation(longest)
    return lambda text: made.encode(text).ids
