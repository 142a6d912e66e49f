"""Which words a text has and which ids they get, and how word vectors are read from the files that others publish."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from cmgan_dist.errors import BadInput
from cmgan_dist.files import open_regular, parse_json, read_bytes

log = logging.getLogger(__name__)

PAD = 0
"""The id that fills a text up behind its end."""
UNKNOWN = 1
"""The id of a word that the vocabulary does not have."""
FIRST_WORD = 2
"""The id of the first word of a vocabulary."""
VERSION = 1
"""The version of a vocabulary file that this program writes and reads."""
_ONE_BY_ONE = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA")
"""How the Unicode names of characters begin that are written without spaces and make a word each."""


class _Separators(dict[int, str]):
    """A table for `str.translate`: letters, marks and digits stay, CJK characters stand alone, the rest is a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] not in "LMN":
            self[code] = " "
        elif unicodedata.name(character, "").startswith(_ONE_BY_ONE):
            self[code] = f" {character} "
        else:
            self[code] = character
        return self[code]


_separators = _Separators()


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text in any script, which are runs of letters, marks and digits.

    Chinese and Japanese are cut into characters. Composed and decomposed accents give the same words (NFC)."""
    return unicodedata.normalize("NFC", text.lower()).translate(_separators).split()


@dataclass
class Vocabulary:
    """The words that have an id. Word i of `words` has the id i + 2; 0 is padding, 1 any other word."""

    words: list[str]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._ids = {word: i + FIRST_WORD for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        """Return the number of ids, those of padding and of unknown words included."""
        return len(self.words) + FIRST_WORD

    @classmethod
    def build(cls, texts: Iterable[str], min_count: int = 1, max_size: int | None = None) -> Vocabulary:
        """Return the vocabulary of at most `max_size` words that occur `min_count` times or more in `texts`.

        Frequent words come first, equally frequent ones by their spelling."""
        counts = Counter[str]()
        for text in texts:
            counts.update(split_words(text))
        kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        return cls([word for _, word in kept[:max_size]])

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words of a text, or [UNKNOWN] for a text without words."""
        return [self._ids.get(word, UNKNOWN) for word in split_words(text)] or [UNKNOWN]

    def to_json(self) -> str:
        """Return what `load` reads; the same words give the same text."""
        return json.dumps({"version": VERSION, "words": self.words}, ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Return the vocabulary in the file `path`. Raises BadInput when it is missing or is not a vocabulary."""
        try:
            record = parse_json(read_bytes(path))
            version, words = record["version"], record["words"]
        except OSError as error:
            raise BadInput(f"vocabulary {path} cannot be read ({error.strerror}): restore it or train again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is not a vocabulary ({error!r}): restore it or train again") from None
        if version != VERSION:
            raise BadInput(f"{path} has version {version}, this program reads {VERSION}: train again")
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or len(set(words)) < len(words):
            raise BadInput(
                f'{path} is not a vocabulary: "words" must be a list of different strings: restore it or train again'
            )
        return cls(words)


BOUND = 0.25
"""A word without a vector is drawn from [-BOUND, BOUND), about the variance of trained ones (Kim, EMNLP 2014)."""
CHUNK = 1 << 20
"""Bytes of a binary file that are read at a time."""
LONGEST_WORD = 10_000
"""The most bytes of a word: a longer one in a binary file means that the file is damaged."""

Vectors = dict[int, np.ndarray]
"""Vectors [D] by their row of the result."""


def load_word_vectors(path: str | Path, words: Sequence[str], seed: int = 0) -> tuple[np.ndarray, int]:
    """Return (vectors of `words`, float32 [len(words), D]; how many of the words the file has).

    Vectors of words that the file lacks are drawn at random, by `seed`. The file is word2vec text (with or without its
    header), GloVe text, or word2vec binary (named ``.bin``), each also gzipped (``.gz``). Only the vectors of `words`
    are kept in memory. A word of the file that is not UTF-8 is passed over. Raises BadInput naming the file and the
    line or byte that is damaged, and where it has none of the words."""
    path = Path(path)
    wanted = {word.encode(): row for row, word in enumerate(words)}
    read = _read_binary if path.name.removesuffix(".gz").endswith(".bin") else _read_text
    try:
        with open_regular(path) as plain, gzip.open(plain) if path.suffix == ".gz" else plain as file:
            found, dim = read(cast(BinaryIO, file), wanted)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"word vectors {path} cannot be read ({reason}): name another file or get it again") from None
    except _Damaged as error:
        raise BadInput(f"word vectors {path}: {error}: get the file again") from None
    if words and not found:
        raise BadInput(f"word vectors {path} have none of the {len(words)} words of the texts: name another file")
    vectors = np.random.default_rng(seed).uniform(-BOUND, BOUND, (len(words), dim)).astype(np.float32)
    for row, vector in found.items():
        if not np.isfinite(vector).all():
            raise BadInput(f"word vectors {path}: the vector of '{words[row]}' holds NaN or Inf: get the file again")
        vectors[row] = vector
    return vectors, len(found)


class _Damaged(Exception):
    """A file of word vectors is damaged; the message says where and how."""


def _is_count(text: bytes) -> bool:
    return text.isdigit() and len(text) < 19  # Python makes no number of thousands of digits


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_text(file: BinaryIO, wanted: dict[bytes, int]) -> tuple[Vectors, int]:
    """Return (vectors of the wanted words, D) of a text file. Lines of other words are checked for their length only.

    A word may hold spaces (GloVe 840B has some), so the vector is the last D fields. Of equal words the first counts:
    these files are sorted by frequency. Raises _Damaged."""
    found: Vectors = {}
    first = file.readline()
    header = first.split()
    promised: int | None = None
    if len(header) == 2 and all(map(_is_count, header)):
        promised, dim = int(header[0]), int(header[1])
        rows = enumerate(file, 2)
    else:
        dim = len(header) - 1
        rows = enumerate(itertools.chain([first], file), 1)
    if dim < 1 or (promised is None and not all(map(_is_number, header[1:]))):
        raise _Damaged("line 1 holds no vector")
    seen, whole = 0, True
    for number, line in rows:
        whole, line = line.endswith(b"\n"), line.rstrip()
        if not line:
            continue
        excess = line.count(b" ") - dim
        if excess < 0 or (excess and all(map(_is_number, line.split(b" ")[1 : excess + 1]))):
            raise _Damaged(f"line {number} has {dim + excess} numbers, expected {dim}")
        seen += 1
        row = wanted.get(line[: line.index(b" ")]) if not excess else None
        if row is not None and row not in found:
            try:
                found[row] = np.array([float(value) for value in line.split(b" ")[1:]], dtype=np.float32)
            except ValueError as error:
                raise _Damaged(f"line {number} holds no vector ({error})") from None
    if promised is not None and seen != promised:
        raise _Damaged(f"it holds {seen} words, its first line promises {promised}")
    if promised is None and not whole:
        log.warning("the word vectors end within a line: if they were cut, the last word is not what it was")
    return found, dim


def _read_binary(file: BinaryIO, wanted: dict[bytes, int]) -> tuple[Vectors, int]:
    """Return (vectors of the wanted words, D) of a word2vec binary file. Raises _Damaged.

    It is a line ``N D`` and N times a word, a space and D little-endian float32, with or without a newline between
    them."""
    found: Vectors = {}
    first = file.readline(64)
    header = first.split()
    if len(header) != 2 or not all(map(_is_count, header)) or not int(header[1]):
        raise _Damaged("it does not begin with a number of words and a dimension")
    promised, dim = int(header[0]), int(header[1])
    buffer, position, base = b"", 0, len(first)  # `base` is the byte of the file at which the buffer begins
    for number in range(promised):
        while True:
            space = buffer.find(b" ", position)
            word_bytes = (space if space >= 0 else len(buffer)) - position
            if word_bytes > LONGEST_WORD:
                raise _Damaged(f"no word at byte {base + position}")
            if space >= 0 and len(buffer) >= space + 1 + 4 * dim:
                break
            more = file.read(CHUNK)
            if not more:
                raise _Damaged(f"it ends at byte {base + len(buffer)} after {number} of {promised} words")
            base += position
            buffer, position = buffer[position:] + more, 0
        row = wanted.get(buffer[position:space].lstrip(b"\n"))
        if row is not None and row not in found:
            found[row] = np.frombuffer(buffer, "<f4", dim, space + 1).astype(np.float32)
        position = space + 1 + 4 * dim
    if (buffer[position:] + file.read(CHUNK)).strip(b"\n"):
        raise _Damaged(f"it goes on at byte {base + position}, behind its {promised} words of dimension {dim}")
    return found, dim
