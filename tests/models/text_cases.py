"""A sentence-transformers model that is small enough for tests."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["red", "green", "blue", "square", "circle", "dog", "boat"]


def stored_sentence_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a model with drawn weights as sentence_transformers does; its tokeniser knows WORDS. Returns the folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    inner = folder.with_name(f"{folder.name}-transformer")
    inner.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (inner / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(inner / "vocab.txt")).save_pretrained(inner)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(inner)
    SentenceTransformer(modules=[Transformer(str(inner)), Pooling(16)], device="cpu").save(str(folder))
    return folder
