"""The report: one page that needs nothing else, for every kind of run, safe against its samples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from deploy.evaluation.report import SAMPLES, read_metrics, write_report
from deploy.quickstart.outcome import IN_REPORT

SUMMARY = {
    "win_rate": 0.8731,
    "win_rate_low": 0.85,
    "win_rate_high": 0.89,
    "ties_share": 0.1,
    "judge_conformance_sft": 0.61,
    "judge_conformance_low_sft": 0.58,
    "judge_conformance_high_sft": 0.64,
    "judge_conformance_policy": 0.957,
    "judge_conformance_human": 0.66,
    "kl": 7.31,
    "rollouts_trained": 6144,
    "rollouts_dropped": 0,
    "seconds_sft": 40.0,
    "seconds_train": 80.0,
}


def metrics(stage: str, steps: int, **values: float) -> str:
    lines = [
        {"stage": stage, "step": step, "time": 0.0, "metrics": values}
        for step in range(1, steps + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def sample(index: int, text: str = "Return it.") -> dict[str, Any]:
    return {
        "prompt": f"def f{index}(x):",
        "human": "People's line.",
        "before": text,
        "after": text,
        "score_before": -0.5,
        "score_after": 1.25,
        "conforms_before": False,
        "conforms_after": True,
    }


def run_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf8")
    return folder


def test_a_finished_quickstart_shows_its_numbers(tmp_path: Path) -> None:
    rows = [json.dumps(sample(i)) for i in range(100)]
    run = run_folder(
        tmp_path / "finished",
        metrics__jsonl=metrics("sft", 3, loss=4.0)
        + metrics("train", 8, score=0.5, kl=2.0, auxiliary_seconds=1.0),
        summary__json=json.dumps(SUMMARY | {"pairs_judged": 998, "pairs_asked": 1000}),
        samples__jsonl="\n".join(rows),
        config__yaml="name: finished",
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    for shown in (
        "87.3%",
        "95.7%",
        "58.0% to 64.0%",
        "7.3",
        "6,144",
        "name: finished",
        "66.0%",
        "998 of 1000 prompts judged",
    ):
        assert shown in page, shown
    assert page.count("<svg") == 3
    assert "an auxiliary phase ran" in page
    assert len(re.findall(r"def f\d+\(x\):", page)) in range(SAMPLES // 2, SAMPLES + 1)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    run = run_folder(tmp_path, metrics__jsonl=metrics("train", 3, score=1.0))
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    loads = re.findall(r"<(?:script|link|img|iframe)\b|@import|url\((?!#)|\ssrc=", page)
    assert not loads
    assert not re.search(r"href=\"https?:", page)


def test_what_a_policy_wrote_cannot_become_markup(tmp_path: Path) -> None:
    run = run_folder(
        tmp_path,
        metrics__jsonl=metrics("sft", 2, loss=1.0),
        samples__jsonl=json.dumps(sample(0, "<script>alert(1)</script>")),
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_an_evaluated_run_without_a_quickstart(tmp_path: Path) -> None:
    run = run_folder(
        tmp_path,
        metrics__jsonl=metrics("train", 2, score=1.0),
        evaluation__json=json.dumps({"score_sft": 0.25, "score_policy": 0.75, "kl": 1.0}),
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    assert "0.250" in page
    assert "0.750" in page
    assert "people" not in page


@pytest.mark.parametrize(
    "values", [{"loss": 1.0}, {"loss": float("nan")}, {"loss": float("inf")}, {"loss": 0.0}]
)
def test_odd_curves_are_drawn(tmp_path: Path, values: dict[str, float]) -> None:
    run = run_folder(tmp_path, metrics__jsonl=metrics("sft", 1, **values))
    assert "<svg" in write_report(run, IN_REPORT).read_text(encoding="utf8")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    whole = metrics("sft", 2, loss=1.0)
    run = run_folder(tmp_path, metrics__jsonl=whole + whole[: len(whole) // 3])
    assert [line.step for line in read_metrics(run / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("text", ["", "{"])
def test_no_metrics_is_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no metrics yet"):
        write_report(run_folder(tmp_path, metrics__jsonl=text))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    text = metrics("sft", 1, loss=1.0) + "{}\n" + metrics("sft", 1, loss=1.0)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        write_report(run_folder(tmp_path, metrics__jsonl=text))
