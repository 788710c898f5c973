"""The live page in a real browser: Debian's Chromium, where it is installed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from common.config.run import RunConfig
from deploy.evaluation.report import write_report
from deploy.feedback.store import Store
from deploy.run_folder.log_lines import read_lines
from tests.deploy.feedback.rounds import plain, round_in
from tests.deploy.watch.served import event, log, log_samples, metrics_of, run_folder, served

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]
TABS = ("outcome", "learning", "throughput", "workers", "samples", "health")
HOSTILE = [
    "<script>document.title = 'stolen'</script>",
    "<img src=x onerror=\"document.title = 'stolen'\">",
    "![picture](http://example.com/x.png) [link](javascript:alert(1))",
    "\x1b]0;stolen\x07\x1b[31mred",
    "\u202egnp.exe \u2066",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


class Watched:
    """A page, what it asked for, and what it complained of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.goto(url)
        page.wait_for_selector("#view > *")

    def open(self, tab: str) -> None:
        self.page.click(f"#tab-{tab}")
        self.page.wait_for_selector(f"#view[data-tab={tab}]")
        if self.page.locator(".plot").count():
            self.page.wait_for_selector(".plot canvas")

    def values(self) -> dict[tuple[str, str], float]:
        """What the panels of a tab say, by panel and curve."""
        found: list[list[Any]] = self.page.eval_on_selector_all(
            "figure[data-panel] b[data-curve]",
            "all => all.map(b => [b.closest('figure').dataset.panel, b.dataset.curve,"
            " Number(b.dataset.value)])",
        )
        return {(panel, curve): value for panel, curve, value in found}

    def sound(self) -> None:
        """It asked nobody else, and complained of nothing."""
        assert [url for url in self.asked if not url.startswith((self.url, "data:"))] == []
        assert self.complaints == []


def test_values_are_the_logs_and_a_new_iteration_is_seen(
    browser: Browser, workspace: RunConfig, tmp_path: Path
) -> None:
    config = run_folder(workspace, tmp_path)
    log_samples(config, 5, ["file", "read the file"])
    with served([config.run_dir]) as url, browser.new_page() as page:
        seen = Watched(page, url)
        last = {line.stage: line.metrics for line in read_lines(config.folder.metrics).lines}
        values = seen.values()
        assert values["Score", "training, score"] == last["train"]["score"]
        assert values["Score", "held-out, score"] == last["held_out"]["score"]
        assert values["Parts of the score", "component/short"] == metrics_of(6)["component/short"]
        tile = page.get_attribute("#tiles b[data-metric=kl]", "data-value")
        assert float(tile or "nan") == last["train"]["kl"]
        assert page.locator("figure canvas").count() == page.locator("figure[data-panel]").count()

        event(config, "rollout-2", "hung", "no answer within 120 s", 165.0)
        log(config, "train", 7, metrics_of(7))
        begin = time.monotonic()
        page.wait_for_selector(
            f"b[data-curve='training, score'][data-value='{metrics_of(7)['score']}']"
        )
        assert page.get_attribute("#standing", "data-step") == "7"
        assert time.monotonic() - begin < 15, "it asks each 1.5 s"
        for tab in TABS:
            seen.open(tab)
            if tab in ("learning", "throughput"):
                assert seen.values()
                assert set(seen.values().values()) <= {*metrics_of(7).values()}
            if tab == "workers":
                assert page.locator("#timeline tbody tr").count() == 3
                legend = page.inner_text("#timeline .legend").split()
                assert legend == ["loading", "sampling", "learning", "publishing", "idle", "lost"]
                assert page.locator("#timeline .span.lost").count() == 1
        seen.sound()


def test_samples_are_read_token_by_token_and_do_nothing(
    browser: Browser, workspace: RunConfig, tmp_path: Path
) -> None:
    config = run_folder(workspace, tmp_path)
    log_samples(config, 5, HOSTILE, prompt=HOSTILE[0])
    event(config, "rollout-0", "died", f"{HOSTILE[1]} {HOSTILE[4]}", 140.0)
    with served([config.run_dir]) as url, browser.new_page() as page:
        seen = Watched(page, url)
        seen.open("workers")
        assert page.locator("#view img, #view script").count() == 0
        assert HOSTILE[1] in page.inner_text("#view .events")
        seen.open("samples")
        page.select_option("#order", "best")
        page.wait_for_selector("#samples tbody tr:first-child button:text-is('000005-000004')")
        page.click("#samples button:text-is('000005-000001')")
        page.wait_for_selector("#tokens")
        assert page.inner_text("#tokens").startswith(HOSTILE[1])
        advantages = page.eval_on_selector_all(
            "tbody tr td:last-child", "all => all.map(cell => Number(cell.innerText))"
        )
        assert advantages == [1 - t for t in range(len(advantages))]
        seen.open("health")
        seen.open("samples")
        assert page.locator("#samples").is_visible(), "who comes back sees all of them"
        page.click("#samples button:text-is('000005-000001')")
        page.wait_for_selector("#tokens")
        page.click("text=back to all")
        page.wait_for_selector("#samples")
        text = page.inner_text("#samples")
        assert "\\u202egnp.exe" in text and "\u202e" not in text and "\x1b" not in text
        assert page.title() != "stolen"
        assert page.locator("#view img, #view script").count() == 0
        seen.sound()

        page.goto(write_report(config.run_dir, config=config).as_uri())
        text = page.inner_text("body")
        assert "\u202e" not in text and "\x1b" not in text
        assert page.title() != "stolen"


def asked_people(config: RunConfig) -> None:
    """A round that two people have answered, one of them always by the left side."""
    made = round_in(config.run_dir, plain(40), overlap_share=1.0, repeat_share=0.0)
    store = Store(made.answers)
    for name, steps in (("ann", (1, 4, 5)), (HOSTILE[1], (0,))):
        store.welcome(name)
        for number in range(30):
            task = store.next_task(name)
            assert task is not None
            store.submit(name, task.key, step=steps[number % len(steps)], seconds=20.0)
    store.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it_on_any_screen(
    browser: Browser, workspace: RunConfig, tmp_path: Path, scheme: Any
) -> None:
    config = run_folder(workspace, tmp_path)
    log(config, "train", 7, {**metrics_of(7), "entropy": 0.01, "kl": 60.0})
    log_samples(config, 5, ["file " * 60, *HOSTILE])
    asked_people(config)
    context = browser.new_context(color_scheme=scheme)
    with served([config.run_dir, config.run_dir]) as url, context.new_page() as page:
        seen = Watched(page, url)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            for tab in (*TABS, "feedback"):
                seen.open(tab)
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{tab} is {wide} wide at {width}"
                found = Axe().run(page).response["violations"]
                grave = [v for v in found if v["impact"] in ("serious", "critical")]
                assert grave == [], json.dumps(grave, indent=1)[:2000]
        seen.sound()
    context.close()


def test_runs_are_laid_over_each_other(
    browser: Browser, workspace: RunConfig, tmp_path: Path
) -> None:
    one = run_folder(workspace, tmp_path / "a")
    two = run_folder(workspace, tmp_path / "b", iterations=4)
    other = two.run_dir.rename(tmp_path / "other")
    with served([one.run_dir, other]) as url, browser.new_page() as page:
        seen = Watched(page, url)
        assert page.locator("#chosen").is_visible()
        page.check("#run-1")
        page.wait_for_selector("b[data-curve='other: kl']")
        values = seen.values()
        title = "KL to the reference"
        assert values[title, f"{one.name}: kl"] == metrics_of(6)["kl"]
        assert values[title, "other: kl"] == metrics_of(4)["kl"]
        page.uncheck("#run-0")
        page.wait_for_selector("#name:text-is('other')")
        seen.sound()


def test_keys_lead_from_tab_to_tab(browser: Browser, workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    with served([config.run_dir]) as url, browser.new_page() as page:
        Watched(page, url)
        page.focus("#tab-outcome")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "tab-learning"
        page.wait_for_selector("#tab-learning[aria-selected=true]")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.id") == "tab-health"


def test_a_server_that_has_gone_is_told(
    browser: Browser, workspace: RunConfig, tmp_path: Path
) -> None:
    config = run_folder(workspace, tmp_path)
    with browser.new_page() as page:
        with served([config.run_dir]) as url:
            Watched(page, url)
        page.wait_for_selector("body.gone")
        assert "does not answer" in page.inner_text("#standing")


def test_long_runs_of_many_workers_are_light(
    browser: Browser, workspace: RunConfig, tmp_path: Path
) -> None:
    config = run_folder(workspace, tmp_path, iterations=0)
    with config.folder.metrics.open("w", encoding="utf8") as file:
        for step in range(1, 10_001):
            line = {"stage": "train", "step": step, "time": step, "metrics": metrics_of(step)}
            file.write(json.dumps(line) + "\n")
    with config.folder.events.open("w", encoding="utf8") as file:
        for number in range(1000):
            made = {"time": 100.0 + number, "worker": f"rollout-{number}", "detail": ""}
            file.write(json.dumps({**made, "what": "started"}) + "\n")
            if number % 3 == 0:
                file.write(json.dumps({**made, "what": "died", "time": 5000.0}) + "\n")
    sizes: list[int] = []
    with served([config.run_dir]) as url, browser.new_page() as page:
        page.on("response", lambda response: sizes.append(len(response.body())))
        seen = Watched(page, url)
        page.wait_for_selector("figure canvas")
        painted = page.evaluate("performance.now()")
        seen.open("workers")
        page.wait_for_selector("tr:nth-child(1000) td.lane")
        assert sum(sizes) < 5_000_000, "bytes before compression"
        assert painted < 20_000, f"{painted} ms; 900 alone on two cores"
        seen.sound()
