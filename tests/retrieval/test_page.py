"""The search page in a real Chromium, as a person uses it: keys, mouse, pictures, links, small and dark screens."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from cmgan_dist.retrieval.pictures import FolderPictures
from tests.retrieval.serve_cases import HOSTILE, HueModel, colour, hue_index, running
from tests.services.browser import running_browser

pytestmark = pytest.mark.process
DROP = """([data, type]) => {
  const bytes = data === null ? new Uint8Array(10485761) : Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], "picture", { type }));
  const event = (name) => new DragEvent(name, { dataTransfer: carried, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event("dragenter"));
  if (document.getElementById("drop").hidden) throw new Error("nothing says where to drop");
  document.body.dispatchEvent(event("drop"));
}"""
PASTE = """(data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], "picture.png", { type: "image/png" }));
  document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true }));
}"""
PATIENCE_MS = 30_000
"""The process that decodes uploads imports for seconds, on a machine that others load for more."""
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("page") / "pictures"
    index = hue_index(folder)
    index.classes = ["warm", "cold", HOSTILE]
    with running(index, HueModel(), FolderPictures(folder), title="Hues", attribution="Drawn here") as address:
        yield address


def opened(browser: Browser, address: str, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """A page, and what went wrong on it: console errors, exceptions, and requests to another host."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)  # type: ignore[arg-type]
    page, wrong = context.new_page(), []
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    host = urlsplit(address).netloc

    def check(url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != host:
            wrong.append(url)

    page.on("request", lambda request: check(request.url))
    return page, wrong


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page at its start. Afterwards nothing must have gone wrong on it."""
    page, wrong = opened(browser, address)
    page.goto(address)
    settled(page)
    yield page
    page.context.close()
    assert wrong == []


def settled(page: Page) -> None:
    """Wait until the answer is shown."""
    page.locator("#results:not([aria-busy])").wait_for(state="attached")


def pictures(page: Page) -> Locator:
    return page.locator("#pictures a.card")


def ids(cards: Locator) -> list[int]:
    return [int(card.get_attribute("data-id") or -1) for card in cards.all()]


def search(page: Page, text: str) -> None:
    page.get_by_role("searchbox", name="Words to search with").fill(text)
    page.keyboard.press("Enter")
    settled(page)


def focused(page: Page) -> str:
    """The id of the item, or of the element, that has the focus."""
    return str(page.evaluate("document.activeElement.dataset.id || document.activeElement.id"))


def test_words_find_pictures_and_texts_with_scores(page: Page) -> None:
    search(page, "green")
    expect(page.locator("#status")).to_have_text("24 pictures, 24 texts")
    expect(pictures(page)).to_have_count(24)
    assert ids(pictures(page))[:3] == [40, 38, 42]
    expect(pictures(page).first).to_contain_text("3.3 sd above chance")
    assert pictures(page).first.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    expect(page.locator("#texts a.card").first).to_contain_text("something green, number 20")
    expect(page.locator("#notice")).to_be_hidden()
    assert urlsplit(page.url).query == "text=green"


def test_more_like_this_and_back(page: Page) -> None:
    search(page, "green")
    pictures(page).nth(2).get_by_text("More like this").click()
    settled(page)
    assert urlsplit(page.url).query == "similar=42"
    expect(page.locator("#query")).to_contain_text("More like this picture")
    assert 42 not in ids(pictures(page))
    assert set(ids(pictures(page))[:2]) == {40, 44}
    page.go_back()
    settled(page)
    assert ids(pictures(page))[:3] == [40, 38, 42]
    expect(page.locator("#text")).to_have_value("green")
    expect(page.locator("#query")).to_be_hidden()


def test_filters_are_kept_in_a_link_that_can_be_shared(page: Page, browser: Browser, address: str) -> None:
    search(page, "green")
    page.get_by_role("radio", name="Pictures").check()
    settled(page)
    expect(page.locator("#texts")).to_be_hidden()
    page.locator("#classes summary").click()
    page.get_by_label("warm").check()
    settled(page)
    expect(pictures(page)).to_have_count(20)
    expect(page.locator("#classes-label")).to_have_text("warm")
    other, wrong = opened(browser, address)
    other.goto(page.url)
    settled(other)
    assert ids(pictures(other)) == ids(pictures(page))
    expect(other.locator("#text")).to_have_value("green")
    assert other.locator("input[value=image]").is_checked()
    assert other.locator("input[value=warm]").is_checked()
    other.reload()
    settled(other)
    expect(pictures(other)).to_have_count(20)
    assert wrong == []
    other.context.close()


def test_a_picture_is_dropped_pasted_or_chosen(page: Page, browser: Browser, address: str) -> None:
    data = base64.b64encode(colour(0.5)).decode()
    page.evaluate(DROP, [data, "image/png"])
    expect(page.locator("#query")).to_contain_text("your picture")
    settled(page)
    assert ids(pictures(page))[0] == 60
    other, _ = opened(browser, address)
    other.goto(page.url)
    settled(other)
    assert ids(pictures(other)) == ids(pictures(page))
    other.context.close()
    page.locator("#clear").click()
    settled(page)
    expect(page.locator("#query")).to_be_hidden()
    page.evaluate(PASTE, base64.b64encode(colour(0.25)).decode())
    expect(page.locator("#query")).to_be_visible()
    settled(page)
    assert ids(pictures(page))[0] == 30
    picture = {"name": "x.webp", "mimeType": "image/webp", "buffer": colour(0.75, format="WEBP")}
    page.locator("#file").set_input_files(picture)  # type: ignore[arg-type]
    expect(pictures(page).first).to_have_attribute("data-id", "90")


def test_what_is_no_picture_or_too_large_is_said(page: Page) -> None:
    page.evaluate(DROP, [base64.b64encode(b"words").decode(), "text/plain"])
    expect(page.get_by_role("alert")).to_contain_text("This is no picture.")
    page.evaluate(DROP, [None, "image/png"])
    expect(page.get_by_role("alert")).to_contain_text("at most 10 MB")


def test_errors_of_the_server_are_shown(browser: Browser, address: str) -> None:
    page, _ = opened(browser, address)  # a browser writes each failed request to its console
    page.goto(f"{address}/?similar=1000")
    expect(page.get_by_role("alert")).to_contain_text("Item 1000 is not in the index")
    page.evaluate(DROP, [base64.b64encode(b"words").decode(), "image/png"])
    expect(page.get_by_role("alert")).to_contain_text("it is no JPEG, PNG or WebP picture")
    search(page, "green")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.evaluate(DROP, [base64.b64encode(b"words").decode(), "image/png"])
    expect(page.get_by_role("alert")).to_contain_text("it is no JPEG, PNG or WebP picture")
    expect(pictures(page)).to_have_count(24)  # what was found before stays
    expect(page.get_by_role("searchbox")).to_have_value("green")
    page.context.close()


def test_far_and_empty_answers_are_said(page: Page) -> None:
    search(page, "quarterly report")
    expect(page.get_by_role("alert")).to_contain_text("The best of these is 0.0 sd above chance")
    expect(page.locator("#notice-title")).to_have_text("Nothing is near.")
    page.locator("#classes summary").click()
    page.locator(".options label").nth(2).click()  # a class without items
    settled(page)
    expect(page.get_by_role("alert")).to_contain_text("Nothing fits.")
    expect(pictures(page)).to_have_count(0)


def test_browsing_goes_on_to_the_end(browser: Browser, tmp_path: Path) -> None:
    index = hue_index(tmp_path / "pictures", 100)
    with running(index, HueModel(), FolderPictures(tmp_path / "pictures")) as address:
        page, wrong = opened(browser, address)
        page.goto(address)
        expect(page.locator("#status")).to_have_text("60 of 100 pictures")
        page.get_by_role("button", name="Show more").click()
        expect(page.locator("#status")).to_have_text("100 of 100 pictures")
        assert ids(pictures(page)) == list(range(0, 200, 2))
        assert focused(page) == "120"
        expect(page.locator("#more")).to_be_hidden()
        assert wrong == []
        page.context.close()


def test_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.press("/")
    assert focused(page) == "text"
    page.keyboard.type("green/")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    settled(page)
    page.keyboard.press("ArrowDown")
    found = ids(pictures(page))
    assert focused(page) == str(found[0])
    page.keyboard.press("ArrowRight")
    assert focused(page) == str(found[1])
    columns = page.locator("#pictures ul").evaluate("e => getComputedStyle(e).gridTemplateColumns.split(' ').length")
    page.keyboard.press("ArrowDown")
    assert focused(page) == str(found[1 + columns])
    width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert width == "3px"  # the focus is seen
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "text"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    settled(page)
    assert urlsplit(page.url).query == f"similar={found[0]}"
    page.keyboard.press("Escape")
    settled(page)
    assert urlsplit(page.url).query == ""
    assert focused(page) == "text"


@pytest.mark.parametrize("query", ["", "?text=green", "?similar=7", "?text=quarterly+report&modality=text"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, address: str, query: str) -> None:
    page, wrong = opened(browser, address, width=390)
    page.goto(f"{address}/{query}")
    settled(page)
    page.locator("#classes summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("header *, main *, footer *")].filter((e) => {
          const { left, right, width } = e.getBoundingClientRect();
          return width > 1 && (left < -1 || right > 391);
        }).map((e) => e.outerHTML.slice(0, 90))"""
    )
    assert beyond == []
    assert wrong == []
    page.context.close()


def test_a_dark_screen_has_dark_colours(browser: Browser, address: str) -> None:
    lightness = []
    for scheme in ("light", "dark"):
        page, wrong = opened(browser, address, scheme=scheme)
        page.goto(address)
        settled(page)
        pairs = [("body", "backgroundColor"), ("body", "color"), (".card", "backgroundColor"), ("#text", "color")]
        read = "(e, name) => getComputedStyle(e)[name].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        lightness.append([page.locator(name).first.evaluate(read, style) for name, style in pairs])
        assert wrong == []
        page.context.close()
    light, dark = lightness
    assert light[0] > 600 > 200 > light[1]
    assert dark[0] < 200 < 500 < dark[1]
    assert dark[2] < 200 < light[2]
    assert dark[3] > 500 > light[3]


def test_hostile_captions_are_text(page: Page) -> None:
    search(page, "red")
    card = page.locator("#texts a.card", has_text="onerror")
    expect(card.locator(".what")).to_have_text(HOSTILE)
    card.click()
    settled(page)
    expect(page.locator("#query-name")).to_have_text(HOSTILE)
    page.locator("#classes summary").click()
    expect(page.locator(".options span").nth(2)).to_have_text(HOSTILE)
    page.locator(".options label").nth(2).click()
    settled(page)
    expect(page.locator("#classes-label")).to_have_text(HOSTILE)
    assert page.locator("script").count() == 1
    assert page.locator("img[onerror]").count() == 0
    assert page.title() == "Hues"


def test_every_control_has_a_name(page: Page) -> None:
    search(page, "green")
    unnamed = page.evaluate(
        """() => {
          const controls = document.querySelectorAll("button, input, a, summary, fieldset, section:not([hidden])");
          const nameless = (e) => {
            const label = e.labels && e.labels[0] ? e.labels[0].textContent : "";
            const by = document.getElementById(e.getAttribute("aria-labelledby"));
            const legend = e.querySelector("legend");
            return !(e.getAttribute("aria-label") || (by || legend || e).textContent || label).trim();
          };
          return [...controls].filter(nameless).map((e) => e.outerHTML.slice(0, 90));
        }"""
    )
    assert unnamed == []
    assert page.locator("img:not([alt])").count() == 0
