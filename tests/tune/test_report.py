"""The page of a search: what it shows, and that what it shows is text and nothing else."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from tune.report import search_report
from tune.results import ENDED, FAILED, Confirmed, Importance, TrialResult
from tune.space import Space

HOSTILE = """'"><script onload=1>{{ 7*7 }}{% raw %}$x$"""
SPACE: Space = {"optim.generator_lr": {"log": [1e-4, 1e-2]}, "loss.adversarial": ["bce", "hinge"]}


class Words(HTMLParser):
    """Collects a page's tags and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


def trials(space: Space, adversarial: str) -> list[TrialResult]:
    names = list(space)
    found = [
        TrialResult(name, dict(zip(names, (lr, adversarial), strict=True)), ENDED, best=best, curve=[(1.0, best)])
        for name, lr, best in (("preset", 1e-3, 0.3), ("1", 5e-3, 0.4))
    ]
    return [*found, TrialResult("2", found[0].values, FAILED, failed="not finite")]


def page(space: Space, tried: list[TrialResult], text: str, **test: Any) -> str:
    confirmed = [Confirmed(f"1{text}", tried[1].values, [0.4, 0.5]), Confirmed("preset", tried[0].values, [0.3, 0.3])]
    shares = Importance({f"{path}{text}": 0.5 for path in space}, 0.5, 10, 1.0)
    return search_report(f"Search{text}", {f"data{text}": f"folder{text}"}, tried, space, confirmed, shares, test)


def test_every_section_is_there() -> None:
    test = {"name": "1", "seeds": 2, "scores": {"map/mean": [0.45, 0.01]}}
    text = page(SPACE, trials(SPACE, "bce"), "", **test)
    for title in ("Best trials", "Confirmation", "Importance", "All trials", "Learning curves", "Failed trials"):
        assert f"<h2>{title}</h2>" in text
    words = Words(text).words
    assert "Test split, trial 1" in words
    assert "0.4500 ± 0.0100" in words
    assert "not finite" in words


def test_what_one_run_gave_has_no_deviation_and_is_no_confirmation() -> None:
    test = {"name": "1", "seeds": 1, "scores": {"map/mean": [0.45, 0.0]}}
    text = search_report("Search", {}, trials(SPACE, "bce"), SPACE, [], None, test)
    assert "<h2>Test</h2>" in text
    assert "<h2>Confirmation</h2>" not in text
    words = Words(text).words
    assert "0.4500" in words
    assert "0.4500 ±" not in words


def test_a_search_without_a_validation_says_so() -> None:
    text = search_report("Search", {}, [], SPACE, [], None, {})
    assert "No trial has reached its first validation." in text
    assert "<h2>" not in text


def test_names_values_and_reasons_are_text_and_nothing_else() -> None:
    space = {"optim.generator_lr": SPACE["optim.generator_lr"], f"loss.kind{HOSTILE}": ["bce", f"form{HOSTILE}"]}
    tried = trials(space, f"form{HOSTILE}")
    tried[1].name, tried[2].failed = f"trial{HOSTILE}", f"reason{HOSTILE}"
    scores = {f"map{HOSTILE}": [0.45, 0.01]}
    text = page(space, tried, HOSTILE, name=f"tested{HOSTILE}", seeds=2, scores=scores)
    parsed = Words(text)
    assert "script" not in parsed.tags
    assert "onload" not in parsed.attributes
    for name in ("Search", "data", "folder", "form", "trial", "reason", "tested", "map"):
        assert f"{name}{HOSTILE}" in parsed.words, name
    # the forest's and the parallel axes' labels are in figures
    assert f"loss.kind{HOSTILE}{HOSTILE}" in parsed.words
    assert f"best, trial trial{HOSTILE}" in parsed.words


@pytest.mark.parametrize("other", ["http://", "https://", "@import", "src="])
def test_the_page_asks_nothing_of_another_host(other: str) -> None:
    text = page(SPACE, trials(SPACE, "bce"), "")
    for name in ("http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"):
        text = text.replace(name, "")
    assert other not in text
