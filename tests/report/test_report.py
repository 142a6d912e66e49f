"""The report: what it shows, what it leaves out, and that it is one valid file that asks nothing of the web."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from cmgan_dist.errors import BadInput
from cmgan_dist.report.found import QUERY_QUANTILES, SHOWN
from cmgan_dist.report.page import INK
from cmgan_dist.report.run import write_report
from cmgan_dist.report.table import results_table
from cmgan_dist.retrieval.baselines import chance
from cmgan_dist.retrieval.evaluate import record_json
from cmgan_dist.retrieval.gallery import GalleryItem
from cmgan_dist.retrieval.headline import Column
from cmgan_dist.retrieval.metrics import Embeddings, common_space, evaluate

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects ids, references and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.attributes |= {*values}
        if tag not in VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.references += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag in ("img", "svg"):
            self.pictures.append(values)
        assert tag != "script"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page(run: Path, items: list[GalleryItem] | None = None) -> tuple[str, Page]:
    path = write_report(run, items)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def embeddings(n: int = 40, labels: bool = True, captions: int = 1, classes: int = 4) -> Embeddings:
    g = torch.Generator().manual_seed(1)
    owner = torch.arange(n).repeat_interleave(captions)
    onehot = torch.eye(classes)[torch.arange(n) % classes]
    image = torch.cat([onehot, torch.zeros(n, 3)], 1) + 0.5 * torch.randn(n, classes + 3, generator=g)
    text = image[owner] + 0.5 * torch.randn(len(owner), classes + 3, generator=g)
    return Embeddings(F.normalize(image), F.normalize(text), owner, onehot.bool() if labels else None)


def save_test(run: Path, data: Embeddings, classes: list[str]) -> dict[str, Any]:
    arrays = {"image": data.image, "text": data.text, "text_owner": data.text_owner}
    if data.labels is not None:
        arrays["labels"] = data.labels
    keys = [f"key{i}" for i in range(len(data.image))]
    np.savez(run / "embeddings.npz", keys=keys, **{k: v.numpy() for k, v in arrays.items()})
    worse = Embeddings(data.image.roll(1, 0), data.text, data.text_owner, data.labels)
    evaluation = {
        "metrics": evaluate(data, "cosine"),
        "baselines": {"chance": chance(data), "CCA": evaluate(worse, "cosine")},
        "classes": classes,
        "data": "toy",
        "split": "test",
        "seed": 7,
        "checkpoint": "best",
    }
    (run / "evaluation.json").write_text(record_json(evaluation))
    return evaluation


def save_training(run: Path, labels: bool = True) -> None:
    lines: list[dict[str, Any]] = []
    for i in range(1, 41):
        line = {"kind": "train", "samples": 64 * i, "epoch": i / 10, "lr": 1e-3, "samples_per_s": 900.0}
        line |= {"loss/D_CI/bce": 1 / i, "loss/image_generator/adversarial": 1.0, "loss/image_generator/class": None}
        line |= {f"accuracy/D_CI/{group}": 0.5 for group in ("real", "fake", "mismatched")}
        lines.append(line | {"margin/D_CI": 0.1 * i, "accuracy/class/image": 0.9})
    for i, value in enumerate((0.2, 0.5, 0.4), 1):
        keys = ("map/image_to_text", "map/text_to_image", "map/mean") if labels else ()
        recalls = [f"recall/{d}@{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        lines.append({"kind": "val", "samples": 1000 * i} | dict.fromkeys([*keys, *recalls], value))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def pictures(n: int, captions: int = 1) -> list[GalleryItem]:
    items = []
    for i in range(n):
        file = io.BytesIO()
        Image.new("RGB", (300, 200), (5 * i, 0, 0)).save(file, "PNG")
        items.append(GalleryItem(f"key{i}", file.getvalue(), [f"words {i}.{j}" for j in range(captions)]))
    return items


def test_whole_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    data = embeddings()
    evaluation = save_test(run, data, ["cat", "dog", "cow", "<script>"])
    save_training(run)
    (run / "config.yaml").write_text("seed: 7\nname: <b>\n")
    text, parsed = page(run, pictures(40))
    for title in (
        *("Results", "Validation", "Losses", "Discriminators", "Precision and recall", "Classes"),
        *("What is taken for what", "The common space", "Examples", "Configuration"),
    ):
        assert f"<h2>{title}</h2>" in text or f"<summary>{title}</summary>" in text
    assert all(r.startswith(("data:image/", "#")) for r in parsed.references)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {r[1:] for r in parsed.references if r.startswith("#")} <= set(parsed.ids)
    assert all(p.get("alt") or p.get("aria-label") for p in parsed.pictures)
    assert "prefers-color-scheme:dark" in text
    assert "name: <b>" in parsed.words
    assert INK not in text
    assert f"{evaluation['metrics']['map/mean']:.3f}".removeprefix("0") in parsed.words
    assert "best mean 0.500 after 2,000 samples" in text
    jpeg = next(r for r in parsed.references if r.startswith("data:image/jpeg"))
    with Image.open(io.BytesIO(base64.b64decode(jpeg.split(",")[1]))) as picture:
        assert picture.size == (224, 149)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    save_test(tmp_path, embeddings(), [])
    save_training(tmp_path)
    first, _ = page(tmp_path)
    assert first == page(tmp_path)[0]


@pytest.mark.parametrize("labels", [True, False])
def test_examples_mark_right_and_wrong(tmp_path: Path, labels: bool) -> None:
    data = embeddings(captions=2, labels=labels)
    save_test(tmp_path, data, ["a", "b", "c", "d"])
    text, _ = page(tmp_path, pictures(40, captions=2))
    image, words = common_space(data)
    similarity = (image @ words.T).numpy()
    rows = re.findall(r'<div class="row">.*?<ol class="found text">.*?</ol>', text, re.DOTALL)
    assert len(rows) == len(QUERY_QUANTILES)
    asked = []
    for row in rows:
        query = int(re.findall(r'alt="words (\d+)\.0"', row)[0])
        found = [tuple(map(int, f)) for f in re.findall(r"<div>words (\d+)\.(\d)</div>", row)]
        expected = np.argsort(-similarity[query], kind="stable")[:SHOWN]
        assert found == [(j // 2, j % 2) for j in expected]
        marks = re.findall(r'<span class="mark">(.*?)</span>', row)
        for (owner, _), mark in zip(found, marks, strict=True):
            assert ("✓" in mark) == (owner % 4 == query % 4 if labels else owner == query)
            assert ("★" in mark) == (owner == query)
        assert [("good" in t) for t in re.findall(r'<li class="tile (\w+)"', row)] == ["✓" in m for m in marks]
        asked.append(len([m for m in marks if "✓" in m]))
    assert asked[0] > asked[-1]


def test_features_without_pictures_show_keys_and_classes(tmp_path: Path) -> None:
    save_test(tmp_path, embeddings(), ["cat", "dog", "cow", "owl"])
    text, parsed = page(tmp_path)
    assert "<img" not in text
    assert re.search(r"text key\d+", parsed.words)
    assert re.search(r"image key\d+(cat|dog|cow|owl)", parsed.words)


def test_a_picture_that_cannot_be_read_shows_its_words(tmp_path: Path) -> None:
    save_test(tmp_path, embeddings(), [])
    items = [GalleryItem(f"key{i}", b"no picture", [f"words <i> {i}"]) for i in range(40)]
    text, parsed = page(tmp_path, items)
    assert "<img" not in text
    assert "words <i>" in parsed.words


CONTROLS = "\x1b[31m\x07\x9b"
HOSTILE = """'"><script onload=1>{{ 7*7 }}{% raw %}$x$"""


@pytest.mark.parametrize("with_items", [True, False])
def test_names_keys_and_captions_are_text_and_nothing_else(tmp_path: Path, with_items: bool) -> None:
    run = tmp_path / "{{ 7*7 }} <i>"
    run.mkdir()
    data = embeddings()
    evaluation = save_test(run, data, [f"{c}{HOSTILE}" for c in "abcd"])
    evaluation["baselines"][f"rival {HOSTILE}"] = evaluation["metrics"]
    evaluation["data"] = f"data {HOSTILE}"
    (run / "evaluation.json").write_text(record_json(evaluation))
    arrays = dict(np.load(run / "embeddings.npz"))
    arrays["keys"] = np.array([f"key{i} {HOSTILE}" for i in range(40)])
    np.savez(run / "embeddings.npz", allow_pickle=False, **arrays)
    save_training(run)
    (run / "config.yaml").write_text(f"name: {HOSTILE}\n")
    items = pictures(40)
    for item in items:
        item.key, item.texts = f"{item.key} {HOSTILE}", [f"{item.texts[0]} {HOSTILE}"]
    text, parsed = page(run, items if with_items else None)
    assert "<script" not in text
    assert "onload" not in parsed.attributes
    assert f"name: {HOSTILE}" in parsed.words
    assert f"data {HOSTILE}" in parsed.words
    assert f"rival {HOSTILE}" in parsed.words
    assert re.search((r"words \d+\.0 " if with_items else r"text key\d+ ") + re.escape(HOSTILE), parsed.words)
    assert parsed.words.lstrip().startswith("{{ 7*7 }} <i>")
    assert any(str(p.get("alt")).endswith(HOSTILE) for p in parsed.pictures) == with_items
    labels = [str(p.get("aria-label")) for p in parsed.pictures]
    assert any(label.startswith("MAP per class, from ") and label.count(HOSTILE) == 2 for label in labels)
    assert f"a{HOSTILE}"[:27] + "…" in parsed.words, "the class is not in the figure of all classes"


def test_control_characters_reach_neither_a_page_nor_a_terminal(tmp_path: Path) -> None:
    evaluation = save_test(tmp_path, embeddings(), [f"{c}{CONTROLS}" for c in "abcd"])
    evaluation["data"] = f"data {CONTROLS}"
    (tmp_path / "evaluation.json").write_text(record_json(evaluation))
    text, parsed = page(tmp_path)
    assert not set(CONTROLS) & set(text) - set("[31m")
    assert "a\\x1b[31m\\x07\\x9b" in parsed.words
    console = Console(width=160, file=io.StringIO())
    results_table(evaluation, console)
    assert isinstance(console.file, io.StringIO)
    assert "data \\x1b[31m\\x07\\x9b" in console.file.getvalue()


def test_baselines_on_features_that_the_model_trained_are_marked(tmp_path: Path) -> None:
    evaluation = save_test(tmp_path, embeddings(), list("abcd"))
    (tmp_path / "evaluation.json").write_text(record_json(evaluation | {"trained_features": ["text"]}))
    _, parsed = page(tmp_path)
    assert "CCA on its features" in parsed.words
    assert "chance on its features" not in parsed.words
    assert "The features of text are of a backbone that this run has trained" in parsed.words


@pytest.mark.parametrize(
    "part", ["metrics", "classes", "ends", "baselines", "frontiers", "trained_features", "map_per_class", "precision"]
)
def test_an_evaluation_with_other_types_is_named(part: str, tmp_path: Path) -> None:
    evaluation = save_test(tmp_path, embeddings(), list("abcd"))
    if part in ("map_per_class", "precision"):
        evaluation["metrics"][f"{part}/image_to_text"] = [0.5]
        part = "metrics"
    else:
        evaluation[part] = {"map/mean": "x"} if part == "metrics" else {"x": {"map/mean": "z"}}
    (tmp_path / "evaluation.json").write_text(record_json(evaluation))
    with pytest.raises(BadInput, match=rf"evaluation.json has '{part}' that no evaluation writes"):
        page(tmp_path)


def test_pairs_without_classes(tmp_path: Path) -> None:
    save_test(tmp_path, embeddings(labels=False), [])
    save_training(tmp_path, labels=False)
    text, _ = page(tmp_path)
    assert "Validation recall over training: best mean 0.500 after 2,000 samples" in text
    assert "Lines join some images" in text
    for title in ("Classes", "What is taken for what", "Precision and recall"):
        assert f"<h2>{title}</h2>" not in text
    assert "MAP" not in text


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    assert "Nothing has been recorded yet" in page(tmp_path)[0]
    save_training(tmp_path)
    curves, _ = page(tmp_path)
    assert re.findall("<h2>(.*?)</h2>", curves) == ["Validation", "Losses", "Discriminators"]
    (tmp_path / "metrics.jsonl").unlink()
    save_test(tmp_path, embeddings(), [])
    (tmp_path / "embeddings.npz").unlink()
    numbers, _ = page(tmp_path)
    assert re.findall("<h2>(.*?)</h2>", numbers) == ["Results", "Precision and recall", "Classes"]


NO_VALUES = '"x"', "[1]", "{}", "true", "NaN", "1e400", str(10**400)


@pytest.mark.parametrize("value", NO_VALUES)
@pytest.mark.parametrize("name", ["samples", "loss/D_CI/bce", "map/image_to_text", "map/mean", "accuracy/D_CI/real"])
def test_lines_of_metrics_that_no_run_writes_are_left_out_and_counted(
    name: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_training(tmp_path)
    whole, _ = page(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    wrong = [json.dumps(json.loads(lines[at]) | {name: "?"}).replace('"?"', value) for at in (3, -1)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines[:7], *wrong, *lines[7:]]))
    assert page(tmp_path)[0] == whole
    assert "metrics.jsonl: 2 damaged lines are left out, the first is line 8" in caplog.text


@pytest.mark.filterwarnings("error")
def test_the_largest_values_are_drawn(tmp_path: Path) -> None:
    save_training(tmp_path)
    largest = {"map/mean": 3.4e38, "loss/D_CI/bce": -3.4e38, "margin/D_CI": 3.4e38, "samples": 10**38}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"kind": kind} | largest) + "\n" for kind in ("train", "val") for _ in range(2))
    assert "<h2>Losses</h2>" in page(tmp_path)[0]


def test_many_classes_and_many_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmgan_dist.report.found.TSNE_POINTS", 100)
    save_test(tmp_path, embeddings(n=180, classes=60), [f"class number {c}" for c in range(60)])
    text, parsed = page(tmp_path)
    assert "The 20 best and worst of 60 classes" in text
    assert "one image in 4 with its texts" in parsed.words
    assert "<h2>What is taken for what</h2>" not in text


def test_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    save_test(tmp_path, embeddings(), [])
    with pytest.raises(BadInput, match="holds 40 images, but 3 items"):
        write_report(tmp_path, pictures(3))
    (tmp_path / "embeddings.npz").write_bytes(b"PK\3\4 broken")
    with pytest.raises(BadInput, match=r"embeddings\.npz is not a file of embeddings"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(BadInput, match=r"evaluation\.json is not as it was written"):
        write_report(tmp_path)


@pytest.mark.parametrize("labels", [True, False])
def test_results_table_prints_the_headline_rows(tmp_path: Path, labels: bool) -> None:
    evaluation = save_test(tmp_path, embeddings(labels=labels), [])
    console = Console(width=160, file=io.StringIO(), force_terminal=True)
    results_table(evaluation, console)
    assert isinstance(console.file, io.StringIO)
    styled = console.file.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", styled)
    assert "toy test" in plain
    header = next(line for line in plain.splitlines() if "chance" in line)
    assert re.split(r"[┃\s]+", header)[1:4] == ["CM-GAN", "CCA", "chance"]
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in plain.splitlines() if "│" in line}
    metrics = evaluation["metrics"]
    assert rows["R@5 text→image %"] == f"{100 * metrics['recall/text_to_image@5']:.1f}"
    assert ("MAP mean" in rows) == labels
    if labels:
        shown = f"{metrics['map/mean']:.3f}".removeprefix("0")
        assert rows["MAP mean"] == shown
        assert re.search(rf"\x1b\[1(;\d+)?m\s*{re.escape(shown)}", styled)


def test_values_of_one_and_of_nothing_are_readable() -> None:
    column, share = Column("MAP", "mean", "map/mean"), Column("R", "@1", "r", percent=True)
    assert [column.show(v) for v in (1.0, 0.5, 0.0, 0.0304, None)] == ["1.000", ".500", ".000", ".030", "–"]
    assert [share.show(v) for v in (1.0, 0.123, None)] == ["100.0", "12.3", "–"]
