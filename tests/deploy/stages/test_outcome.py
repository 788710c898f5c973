"""What `talipot train` prints at its end, and where its bar begins."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config.run import RunConfig
from deploy import screen
from deploy.screen import progress_bar
from deploy.stages.policy import outcome_of

FACTS: dict[str, Any] = {
    "finished": True,
    "iterations": 12,
    "weights_hash": "f00d",
    "rollouts_trained": 192,
    "rollouts_dropped": 0,
    "worker_failures": 3,
    "learner_restarts": 0,
    "leases_reissued": 0,
}


def logged(folder: Path, scores: list[tuple[int, float]]) -> RunConfig:
    """A run with these (iteration, score) in its log."""
    config = RunConfig.model_validate(
        {"name": "run", "output": str(folder), "train": {"iterations": 12}}
    )
    config.run_dir.mkdir()
    lines = [
        {"stage": stage, "step": step, "metrics": {"score": score, "kl": 1.0}}
        for stage, step, score in [("sft", 1, -9.0), *(("train", *each) for each in scores)]
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    config.folder.metrics.write_text(text, encoding="utf8")
    return config


def test_the_outcome_comes_first_and_counts_only_where_something_was_lost(tmp_path: Path) -> None:
    # Iteration 12 was trained twice, over a failure: the later line counts.
    scores = [(i, float(i)) for i in range(1, 12)] + [(12, 99.0), (12, 12.0)]
    shown = outcome_of(logged(tmp_path, scores), FACTS)
    assert list(shown) == [
        "score", "kl", "iterations", "policy", "rollouts trained", "worker failures",
    ]  # fmt: skip
    assert shown["score"] == "3 -> 10", "means of 1 to 5 and of 8 to 12"
    assert shown["iterations"].startswith("12 of 12; a -> b: means of the first 5 and of the last")
    assert shown["worker failures"] == 3
    assert "f00d" not in str(shown)


@pytest.mark.parametrize("scores", [[], [(1, 0.5)]])
def test_a_run_that_was_stopped_says_how_to_go_on(
    tmp_path: Path, scores: list[tuple[int, float]]
) -> None:
    config = logged(tmp_path, scores)
    shown = outcome_of(config, FACTS | {"finished": False, "iterations": len(scores)})
    assert shown["carry on"] == f"talipot train --resume {config.run_dir}"
    assert shown.get("score") == ("0.5 -> 0.5" if scores else None)


def test_a_bar_begins_where_the_run_goes_on() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    with progress_bar(console, "policy", 20, done=7):
        pass
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "7/20" in shown and "0/20" not in shown


def test_in_a_file_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=200, color_system=None)
    with progress_bar(console, "policy", 20, done=7) as bar:
        bar.update(8, "score 1.0")
        monkeypatch.setattr(screen, "LOG_EVERY_S", 0.0)
        bar.update(9, "score 2.0")
        monkeypatch.setattr(screen, "LOG_EVERY_S", 60.0)
        bar.update(10, "score 3.0")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "  policy: 9 of 20  score 2.0\n"
