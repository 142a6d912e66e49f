"""Words of any script, their ids, and word-vector files of every published form, damaged ones too."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.models import vocabulary
from cmgan_dist.models.vocabulary import BOUND, UNKNOWN, Vocabulary, load_word_vectors, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog, 2 CATS!", ["a", "man", "s", "dog", "2", "cats"]),
        ("Ein KÄFER über-quert", ["ein", "käfer", "über", "quert"]),
        ("жёлтый ДОМ", ["жёлтый", "дом"]),
        ("红色的花 is red", ["红", "色", "的", "花", "is", "red"]),
        ("犬がカメラを", list("犬がカメラを")),
        ("빨간 꽃", ["빨간", "꽃"]),
        ("قِطَّة صغيرة", ["قِطَّة", "صغيرة"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301", ["café"]),
        ("İstanbul", ["i\u0307stanbul"]),
        ("snake_case\t\u00a0x\u200by 🐕", ["snake", "case", "x", "y"]),
        ("", []),
        ("... !?", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_vocabulary_keeps_frequent_words_first() -> None:
    texts = ["b a c", "a b", "A d", "e"]
    made = Vocabulary.build(texts, min_count=1)
    assert made.words == ["a", "b", "c", "d", "e"]
    assert Vocabulary.build(texts, min_count=2).words == ["a", "b"]
    assert Vocabulary.build(texts, min_count=1, max_size=3).words == ["a", "b", "c"]
    assert len(made) == 7
    assert made.encode("a E nothing A") == [2, 6, UNKNOWN, 2]
    assert made.encode("?!") == [UNKNOWN]


def test_the_same_words_give_the_same_bytes(tmp_path: Path) -> None:
    texts = [f"w{i % 37} x{i % 5} ü红" for i in range(300)]
    (tmp_path / "a.json").write_text(Vocabulary.build(texts).to_json(), encoding="utf-8")
    random.Random(0).shuffle(texts)
    assert Vocabulary.build(iter(texts)).to_json() == (tmp_path / "a.json").read_text(encoding="utf-8")
    loaded = Vocabulary.load(tmp_path / "a.json")
    assert loaded == Vocabulary.build(texts)
    assert loaded.encode("w3 红 zzz") == Vocabulary.build(texts).encode("w3 红 zzz")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 1}', '{"version": 9, "words": []}', '{"version": 1, "words": ["a", "a"]}',
     '{"version": 1, "words": [1]}', '{"version": 1, "words": "ab"}'],
)  # fmt: skip
def test_a_file_that_is_no_vocabulary(tmp_path: Path, content: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"v\.json"):
        Vocabulary.load(path)


def test_a_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        Vocabulary.load(tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------- word vectors

TABLE = {b"the": [0.5, -1.0, 2.0], b"dog": [1.25, 0.0, -3.5], "käfer".encode(): [0.1, 0.2, 0.3], b"\xff\xfe": [9, 9, 9]}


def glove(table: dict[bytes, list[float]], end: bytes = b"") -> bytes:
    return b"".join(word + b" " + b" ".join(b"%g" % v for v in values) + end + b"\n" for word, values in table.items())


def word2vec(table: dict[bytes, list[float]]) -> bytes:
    return b"%d 3\n" % len(table) + glove(table, b" ")


def binary(table: dict[bytes, list[float]], newline: bytes = b"\n", count: int | None = None) -> bytes:
    head = b"%d 3\n" % (len(table) if count is None else count)
    return head + b"".join(w + b" " + np.array(v, "<f4").tobytes() + newline for w, v in table.items())


FORMS: dict[str, Callable[[], bytes]] = {
    "glove.txt": lambda: glove(TABLE),
    "spaces.txt": lambda: glove({**TABLE, b". . .": [1, 2, 3], b"dog x@y.org": [1, 2, 3]}),
    "w2v.vec": lambda: word2vec(TABLE),
    "w2v.bin": lambda: binary(TABLE),
    "nonl.bin": lambda: binary(TABLE, b""),
    "glove.txt.gz": lambda: gzip.compress(glove(TABLE)),
    "w2v.bin.gz": lambda: gzip.compress(binary(TABLE)),
    "repeated.txt": lambda: glove(TABLE) + b"dog 7 7 7\n",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_every_form_gives_the_same_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, chunk: int
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    path = tmp_path / form
    path.write_bytes(FORMS[form]())
    vectors, found = load_word_vectors(path, ["dog", "missing", "käfer", "the"], seed=3)
    assert found == 3
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, 3)
    for row, word in ((0, b"dog"), (2, "käfer".encode()), (3, b"the")):
        assert np.allclose(vectors[row], TABLE[word])
    assert (np.abs(vectors[1]) <= BOUND).all()
    again, _ = load_word_vectors(path, ["dog", "missing", "käfer", "the"], seed=3)
    assert np.array_equal(vectors, again)
    other, _ = load_word_vectors(path, ["dog", "missing", "käfer", "the"], seed=4)
    assert not np.array_equal(vectors[1], other[1])


def test_a_large_binary_file_over_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 1000)
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(400, 3)).astype(np.float32)
    table = {f"word{i}".encode() * (1 + i % 9): row.tolist() for i, row in enumerate(numbers)}
    (tmp_path / "a.bin").write_bytes(binary(table))
    vectors, found = load_word_vectors(tmp_path / "a.bin", [w.decode() for w in table])
    assert found == 400
    assert np.array_equal(vectors, numbers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", glove(TABLE) + b"cut 0.5 1\n", "line 5 has 2 numbers, expected 3"),
        ("wide.txt", glove(TABLE) + b"wide 1 2 3 4\n", "line 5 has 4 numbers, expected 3"),
        ("header.vec", b"4 5\n" + glove(TABLE), "line 2 has 3 numbers, expected 5"),
        ("fewer.vec", b"9 3\n" + glove(TABLE), "holds 4 words, its first line promises 9"),
        ("letters.txt", glove(TABLE) + b"cat 1 x 2\n", "line 5 holds no vector"),
        ("nan.txt", glove(TABLE) + b"cat 1 nan 2\n", "'cat' holds NaN or Inf"),
        ("empty.txt", b"", "line 1 holds no vector"),
        ("cut.bin", binary(TABLE)[:-9], "ends at byte 65 after 3 of 4 words"),
        ("longer.bin", binary(TABLE, count=2), "goes on at byte 37, behind its 2 words of dimension 3"),
        ("nohead.bin", b"\0" * 100, "does not begin with a number of words"),
        ("noword.bin", b"9 3\n" + b"x" * 20_000, "no word at byte 4"),
        ("cut.txt.gz", gzip.compress(glove(TABLE) * 50, mtime=0)[:-20], "cannot be read"),
        ("plain.txt.gz", glove(TABLE), "cannot be read"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_damage_names_the_file_and_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str, chunk: int
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_word_vectors(path, ["dog", "cat"])
    assert str(path) in str(caught.value)


def test_a_missing_word_vector_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        load_word_vectors(tmp_path / "none.txt", ["a"])


def test_json_is_plain() -> None:
    assert json.loads(Vocabulary(["a", "ü"]).to_json()) == {"version": 1, "words": ["a", "ü"]}
