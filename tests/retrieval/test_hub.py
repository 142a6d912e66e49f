"""A model given away: as a folder, and through a hub that runs on this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

import cmgan_dist
from cmgan_dist.config.fields import Config
from cmgan_dist.errors import BadInput
from cmgan_dist.files import sha256_of
from cmgan_dist.models.saved import read_model, spec_json
from cmgan_dist.retrieval.evaluate import record_json
from tests.services.hub_server import HubServer, hub_server
from tests.toy import environment, save_untrained, small_config

TOKEN = "hf_of_this_test"


def raw_config() -> Config:
    config = small_config(8)
    config.model.image.name, config.model.image.image_size = "test_efficientnet", 32
    config.model.text.name, config.model.text.channels = "cnn", 4
    config.output, config.stream.cache = "/somewhere/run", "/somewhere/cache"
    return config


def record_of(run: Path, **fields: object) -> None:
    metrics = {"map/mean": 0.61, "map/image_to_text": 0.6, "recall/image_to_text@1": 0.125}
    record = {"metrics": metrics, "baselines": {"CCA": {"map/mean": 0.4}}, "split": "test"}
    record |= {"data": "/somewhere/data", "model": sha256_of(run / "best" / "model.safetensors"), **fields}
    (run / "evaluation.json").write_text(record_json(record))


def front_of(card: str) -> dict[str, object]:
    """The metadata of a model card, read as the hub does."""
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_folder_is_the_same_model_without_paths_of_this_machine(
    raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = raw_data()
    save_untrained(tmp_path / "run", data, raw_config())
    record_of(tmp_path / "run")
    model = cmgan_dist.load(tmp_path / "run")
    given = model.save_pretrained(tmp_path / "given", license="cc-by-4.0")
    shutil.rmtree(data)
    again = cmgan_dist.Model.from_pretrained(given)
    np.testing.assert_array_equal(again.encode_texts("red dog"), model.encode_texts("red dog"))
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(again.encode_images(picture), model.encode_images(picture))
    for path in given.rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        assert b"/somewhere" not in text, path
        assert str(tmp_path).encode() not in text, path
    assert again.saved.spec.files["model.safetensors"] == model.saved.spec.files["model.safetensors"]


def test_the_card_has_metadata_metrics_data_and_use(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    record_of(tmp_path / "run")
    saved = read_model(tmp_path / "run")
    saved.spec.attribution = "From <b>somewhere</b> | licence *free*"
    model = cmgan_dist.Model(saved)
    card = (model.save_pretrained(tmp_path / "given", license="cc-by-4.0") / "README.md").read_text()
    assert front_of(card)["license"] == "cc-by-4.0"
    assert front_of(card)["library_name"] == "cmgan_dist"
    assert "cross-modal-retrieval" in front_of(card)["tags"]  # type: ignore[operator]
    assert "| MAP mean | .610 | .400 |" in card
    assert "| R@1 image→text % | 12.5 | – |" in card
    assert r"From &lt;b&gt;somewhere&lt;/b&gt; \| licence \*free\*" in card
    assert "3 classes: class 0, class 1, class 2." in card
    assert "| text | cnn | in this repository | 12 |" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert 'from_pretrained("given")' in code[1]
    assert "\n\n\n" not in card
    # a copy of the copy still knows its evaluation
    second = cmgan_dist.Model.from_pretrained(tmp_path / "given").save_pretrained(tmp_path / "second")
    assert "| MAP mean | .610 | .400 |" in (second / "README.md").read_text()


def test_a_card_shows_no_metrics_of_another_checkpoint(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", feature_data(label_kind="none"), small_config(8))
    record_of(tmp_path / "run", model="0" * 64)
    card = (cmgan_dist.load(tmp_path / "run").save_pretrained(tmp_path / "given") / "README.md").read_text()
    assert "How good" not in card
    assert "MAP mean" not in card
    assert "license" not in front_of(card)
    assert "Pairs without class labels." in card
    assert "t = model.encode_texts(features)  # float32 [n, 7] -> [n, 8], no longer than 1" in card
    assert "| image | not known |  | 12 |" in card


def test_weights_that_lay_in_a_file_go_along(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data, config = feature_data(), small_config(8)
    save_untrained(tmp_path / "run", data, config)
    spec = tmp_path / "run" / "best" / "model.json"
    (tmp_path / "run" / "best" / "backbones" / "image").mkdir(parents=True)
    kept = tmp_path / "run" / "best" / "backbones" / "image" / "weights.pth"
    kept.write_bytes(b"weights")
    record = read_model(tmp_path / "run").spec
    record.files["backbones/image/weights.pth"] = sha256_of(kept)
    spec.write_text(spec_json(record))
    given = cmgan_dist.load(tmp_path / "run").save_pretrained(tmp_path / "given")
    assert (given / "backbones" / "image" / "weights.pth").read_bytes() == b"weights"
    record.files["../outside"] = sha256_of(kept)
    spec.write_text(spec_json(record))
    with pytest.raises(BadInput, match=r"model\.json names the file '\.\./outside', which is outside of its folder"):
        cmgan_dist.load(tmp_path / "run")


def test_bad_folders_are_said_in_one_sentence(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    model = cmgan_dist.load(tmp_path / "run")
    with pytest.raises(BadInput, match="best is a run's own folder: name another"):
        model.save_pretrained(tmp_path / "run" / "best")
    for other in ("run", "second"):  # its own files would be replaced by the card's
        save_untrained(tmp_path / "second", tmp_path / "data", small_config(8))
        with pytest.raises(BadInput, match="is a run's own folder: name another"):
            model.save_pretrained(tmp_path / other)
    with pytest.raises(BadInput, match=r"folder is 'a\\x00b', which holds characters that no path can"):
        model.save_pretrained("a\0b")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file cannot be written \(File exists\)"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "run" / "best" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="is damaged"):
        model.save_pretrained(tmp_path / "given")
    assert not (tmp_path / "given" / "model.json").exists()


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with hub_server(TOKEN) as server:
        yield server


def python(code: str, hub: HubServer, home: Path, token: str = TOKEN) -> str:
    """What a user's program prints; huggingface_hub reads its environment when it is imported."""
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    here |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | here, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_model_goes_to_the_hub_and_comes_back(hub: HubServer, raw_data: Callable[..., Path], tmp_path: Path) -> None:
    save_untrained(tmp_path / "run", raw_data(), raw_config())
    record_of(tmp_path / "run")
    code = f"""
import cmgan_dist, numpy as np
model = cmgan_dist.load({str(tmp_path / "run")!r})
print(model.push_to_hub("lab/toy-model", private=True, license="mit"))
print(model.push_to_hub("lab/toy-model"))
again = cmgan_dist.Model.from_pretrained("lab/toy-model")
assert np.array_equal(again.encode_texts("red dog"), model.encode_texts("red dog"))
print(again.saved.folder)
try:
    cmgan_dist.Model.from_pretrained("lab/not-there")
except cmgan_dist.BadInput as error:
    print(error)
"""
    first, second, folder, missing = python(code, hub, tmp_path / "home").splitlines()
    files = hub.repositories["lab/toy-model"]
    expected = ["README.md", "config.yaml", "evaluation.json", "model.json", "model.safetensors", "vocabulary.json"]
    assert sorted(files) == [".gitattributes", *expected]
    assert hub.private["lab/toy-model"]
    assert first.startswith(f"{hub.url}/lab/toy-model/commit/")
    assert second.startswith(f"{hub.url}/lab/toy-model/commit/")
    card = files["README.md"].decode()
    assert 'cmgan_dist.Model.from_pretrained("lab/toy-model")' in card
    assert "license" not in front_of(card)  # the second upload named none
    assert any(request.startswith("PUT /blobs/") for request in hub.requests)  # the weights went by git-lfs
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert not (Path(folder) / "README.md").exists()  # nothing is fetched that is not used
    assert missing.startswith("lab/not-there is no folder here, and the hub does not give it (")


def test_a_hub_that_refuses_is_said_in_one_sentence(
    hub: HubServer, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_untrained(tmp_path / "run", feature_data(), small_config(8))
    code = f"""
import cmgan_dist
try:
    cmgan_dist.load({str(tmp_path / "run")!r}).push_to_hub("lab/refused")
except cmgan_dist.BadInput as error:
    print(error)
"""
    said = python(code, hub, tmp_path / "home", token="hf_another").strip()
    assert said.startswith("the hub did not take lab/refused (")
    assert "401" in said
    assert "lab/refused" not in hub.repositories
