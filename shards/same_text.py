"""When two texts are the same: what keeps samples in one split, and what `verify` finds in two."""

from __future__ import annotations

import unicodedata

from cmgan_dist.models.vocabulary import split_words


def compared(text: str) -> str:
    """Return what is equal for texts that are the same: their words, whatever their case, width, accents' form,
    spaces and punctuation; of one without words, its characters.

    The words are the model's (`split_words`), of the text in NFKC without case."""
    plain = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(split_words(plain) or plain.split())
