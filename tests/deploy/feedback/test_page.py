"""The labelling page in a real browser: by keys alone, for everybody, whatever a model writes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from deploy.feedback.store import Store
from tests.deploy.feedback.rounds import invited, pairs_of, plain, round_in, served

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]
HOSTILE = [
    "<script>window.stolen = 1</script>",
    '<img src=x onerror="window.stolen = 1">',
    "<svg onload=window.stolen=1>",
    "<iframe src='http://example.com'></iframe>",
    "<a href='javascript:window.stolen=1'>x</a>",
    "<a href='data:text/html,<script>1</script>'>x</a>",
    "![x](http://example.com/x.png) [y](javascript:alert(1))",
    "<form action='http://example.com'><button>x</button></form>",
    "<style>body { background: url(http://example.com/x) }</style>",
    "</div></section></main><script>window.stolen = 1</script>",
    "\u202egnp.exe \u2066 \u200f &#x202e;fdp &#x9b;",
    "```html\n<script>window.stolen = 1</script>\n```",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


class Desk:
    """A labeler's browser, and what it complained of."""

    def __init__(self, browser: Browser, link: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda said: (
                self.complaints.append(said.text) if said.type in ("error", "warning") else None
            ),
        )
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(link)
        self.page.keyboard.press("Tab")
        self.press("Enter")
        self.page.wait_for_selector("h1:has-text('Which'), h1:has-text('Nothing')")

    @property
    def key(self) -> str | None:
        """Of the pair that is shown; None where nothing is left."""
        form = self.page.query_selector("#answer")
        return None if form is None else form.get_attribute("data-key")

    def press(self, key: str) -> None:
        """Press a key that leads to the next page, and wait until that has its style and script.

        A heading is there before they are: a key that is pressed then does nothing.
        """
        with self.page.expect_navigation():
            self.page.keyboard.press(key)

    def sound(self, address: str) -> None:
        assert self.complaints == []
        assert [url for url in self.asked if not url.startswith((address, "data:"))] == []
        self.context.close()


def test_three_people_label_by_keys_alone(browser: Browser, tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(60), overlap=2, overlap_share=0.2, repeat_share=0.0)
    with served(tmp_path, made) as address:
        people = {n: Desk(browser, invited(tmp_path, address, n)) for n in ("ann", "bob", "cid")}
        ann = people["ann"]
        key = ann.key
        ann.page.close()
        ann.page = ann.context.new_page()
        ann.page.goto(address)
        assert ann.key == key, "who comes back finds the pair that was shown"
        ann.press("1")
        ann.press("u")
        ann.press("7")
        ann.press("s")
        pressed = {"ann": "1", "bob": "6", "cid": "4"}
        while any(desk.key for desk in people.values()):
            for name, desk in people.items():
                if desk.key:
                    desk.press(pressed[name])
        assert "Nothing is left" in ann.page.inner_text("h1")
        for desk in people.values():
            desk.sound(address)
    store = Store(made.answers)
    standing = [a for a in store.standing() if a.kind == "answer"]
    assert store.left() == 0
    store.close()
    assert len({(a.pair_uid, a.labeler) for a in standing}) == len(standing)
    counts = Counter(Counter(a.pair_uid for a in standing).values())
    assert counts.keys() == {1, 2} and sum(counts.values()) == 60
    assert all(0 < a.seconds < 60 for a in standing)
    of = {name: [a for a in standing if a.labeler == name] for name in pressed}
    assert [a.chose_left for a in of["ann"]] == [False] + [True] * (len(of["ann"]) - 1)
    assert {a.preference for a in of["ann"]} == {3, -3}
    assert {a.chose_left for a in of["bob"]} == {False}
    assert {a.preference for a in of["bob"]} == {2, -2}
    assert {a.preference for a in of["cid"]} == {0}


def test_what_differs_is_shown_on_demand(browser: Browser, tmp_path: Path) -> None:
    made = round_in(tmp_path, pairs_of([("p", "one two three", "one 2 three")]))
    with served(tmp_path, made) as address:
        desk = Desk(browser, invited(tmp_path, address, "ann"))
        marks = desk.page.eval_on_selector_all("mark", "all => all.map(m => m.innerText.trim())")
        assert sorted(marks) == ["2", "two"]
        colour = "getComputedStyle(document.querySelector('mark')).backgroundColor"
        plainly = desk.page.evaluate(colour)
        desk.page.keyboard.press("d")
        assert desk.page.evaluate(colour) != plainly
        assert desk.page.is_visible("#keys")
        desk.page.keyboard.press("?")
        assert not desk.page.is_visible("#keys")
        desk.page.click("#show-differences")
        assert desk.page.evaluate(colour) == plainly
        desk.page.focus("#why")
        desk.page.keyboard.type("1 is better, undo s")
        assert desk.key, "who writes presses no buttons"
        desk.page.keyboard.press("Escape")
        desk.press("4")
        desk.sound(address)


@pytest.mark.parametrize("csp", [True, False], ids=["csp", "no-csp"])
@pytest.mark.parametrize("markdown", [False, True], ids=["plain", "markdown"])
def test_whatever_a_model_writes_is_text(
    browser: Browser, tmp_path: Path, markdown: bool, csp: bool
) -> None:
    pairs = pairs_of([(text, f"a {text}", f"b {text}") for text in HOSTILE])
    made = round_in(tmp_path, pairs, repeat_share=0.0, guidelines=HOSTILE[0], markdown=markdown)
    with served(tmp_path, made) as address:
        link = invited(tmp_path, address, "<b onmouseover=window.stolen=1>ann</b>")
        context = browser.new_context(bypass_csp=not csp)
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(link)
        for _ in ("this is me", "the guidelines are read"):
            with page.expect_navigation():
                page.click("button")
        seen = 0
        while page.query_selector("#answer"):
            seen += 1
            page.fill("#why", HOSTILE[seen % len(HOSTILE)])
            with page.expect_navigation():
                page.click("button[value='6']")
            assert page.evaluate("window.stolen") is None
            found = "main img, main svg, main iframe, main script, main a, main style"
            assert page.locator(found).count() == 0
        assert seen == len(HOSTILE)
        assert [url for url in asked if not url.startswith((address, "data:"))] == []
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it_on_any_screen(browser: Browser, tmp_path: Path, scheme: Any) -> None:
    long, hebrew = "word " * 4000, "שלום עולם. " * 30
    made = round_in(tmp_path, pairs_of([(hebrew, long, hebrew + "1")]))
    with served(tmp_path, made) as address:
        desk = Desk(browser, invited(tmp_path, address, "ann"), color_scheme=scheme)
        for width in (1280, 390):
            desk.page.set_viewport_size({"width": width, "height": 900})
            assert desk.page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(desk.page).response["violations"]
            grave = [v for v in found if v["impact"] in ("serious", "critical")]
            assert grave == [], json.dumps(grave, indent=1)[:2000]
            small = desk.page.eval_on_selector_all(
                "button:not([hidden]), select",
                "all => all.map(b => b.getBoundingClientRect())"
                ".filter(r => r.height < 44 || r.width < 44)",
            )
            assert small == []
        desk.sound(address)
