"""What a terminal shows while the policy is trained: all of it, at 80 columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from deploy.control.status import Status
from deploy.run_folder.log_lines import Line
from deploy.screen import fitting, progress_bar, spark
from deploy.stages.policy import _Screen

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def status(iteration: int, iterations: int = 10_000) -> Status:
    metrics = {"score": -12.345 + iteration, "kl": 1.5 * iteration, "entropy": 2.0 / iteration}
    return Status(
        iteration=iteration,
        iterations=iterations,
        metrics={**metrics, "tokens_per_second": 123_456.7, "policy_version": iteration},
        rollout_workers=1000,
        reward_workers=24,
        counts={},
        workers=[],
        health=[],
    )


def frames(width: int, encoding: str = "utf-8") -> str:
    """All that a terminal of this width is sent, without what moves its cursor."""
    raw = io.BytesIO()
    console = Console(
        file=io.TextIOWrapper(raw, encoding=encoding, errors="replace"),
        force_terminal=True,
        width=width,
        no_color=True,
    )
    with progress_bar(console, "policy", 10_000) as bar:
        screen = _Screen(console, bar.update, [])
        for iteration in range(1, 6):
            screen(status(iteration))
            bar._progress.refresh()
    console.file.flush()
    return ESCAPE.sub("\n", raw.getvalue().decode(encoding)).replace("\r", "\n")


@pytest.mark.parametrize("width", [80, 200])
def test_every_frame_shows_score_and_kl_and_none_is_cut(width: int) -> None:
    lines = [line.rstrip() for line in frames(width).splitlines() if line.strip()]
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    for iteration in range(1, 6):
        (shown,) = {line for line in lines if f"score {iteration - 12.345:.2f}" in line}
        assert f"KL {1.5 * iteration:.2f}" in shown
        assert f"entropy {2 / iteration:.2f}" in shown
    assert any("5/10000" in line for line in lines)
    assert any("▁▃▄▆█" in line or "▁▃▅▆█" in line for line in lines)


def test_a_terminal_without_these_letters_has_no_pictures() -> None:
    shown = frames(80, "ascii")
    assert "score" in shown and "?" not in "".join(re.findall(r"score.*", shown))


def test_a_resumed_run_goes_on_with_its_picture() -> None:
    told: list[str] = []
    before = [Line(stage="train", step=s, metrics={"score": float(s)}) for s in (1, 2, 3)]
    console = Console(file=io.StringIO(), force_terminal=True)
    _Screen(console, lambda _, note: told.append(note), before)(status(4))
    assert re.search(r"score -8.35 [▁-█]{4}", told[0])


def test_a_status_before_the_first_iteration_shows_workers_alone() -> None:
    told: list[str] = []
    early = Status(metrics={}, counts={}, workers=[], health=[], rollout_workers=2)
    _Screen(Console(file=io.StringIO()), lambda _, note: told.append(note), [])(early)
    assert told == ["2 workers"]


def test_metrics_of_another_iteration_are_not_drawn() -> None:
    told: list[str] = []
    screen = _Screen(
        Console(file=io.StringIO(), force_terminal=True), lambda _, note: told.append(note), []
    )
    late = status(9)
    late.iteration = 4  # the learner went back
    screen(late)
    screen(status(5))
    assert re.search(r"score -7.35  KL", told[-1]), "one iteration is no picture"


def test_notes_fit() -> None:
    assert fitting("a 1  b 2  c 3", 8) == "a 1  b 2"
    assert fitting("a 1", 1) == "a 1", "the first part stays"
    assert spark([1.0, 1.0]) == "▁▁"
    assert spark([0.0, 7.0, 3.5]) == "▁█▅"
