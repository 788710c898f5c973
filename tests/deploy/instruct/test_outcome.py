"""Results of the recipe instruct: their keys in summary.json, on the screen and in the report."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from common.config.recipe import load_config
from deploy.evaluation.intervals import Interval
from deploy.evaluation.report import write_report
from deploy.instruct.instructions import KINDS
from deploy.instruct.outcome import IN_REPORT, Evaluation, Outcome, Verdict, show_outcome
from deploy.tasks import TASKS, task_of

PROMISED = {
    "judge_accuracy_before",
    "judge_accuracy_after",
    "seconds_pipeline",
    "resident_gb",
    "kl",
    "rollouts_issued",
    "rollouts_trained",
    "rollouts_dropped",
}


def interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.0625, high=mean + 0.0625)


def verdict(share: float) -> Verdict:
    return Verdict(
        judge_accuracy=interval(share),
        judge_accuracy_kinds=interval(0.25),
        judge_accuracy_combinations=interval(0.125),
        judge_accuracy_sampled=interval(share),
        instruction_accuracy=interval(share),
        score=0.5,
        response_length=40.0,
        distinct=1.0,
        text_nll=3.25,
        capitals_known=interval(0.75),
    )


OUTCOME = Outcome(
    evaluation=Evaluation(
        verdicts={"before": verdict(0.25), "after": verdict(0.5)},
        follows={
            "before": {kind: interval(0.25) for kind in KINDS},
            "after": {kind: interval(0.5) for kind in KINDS},
        },
        judge_accuracy_rise=interval(0.25),
        judge_accuracy_sampled_rise=interval(0.125),
        kl=3.5,
    ),
    trained={"rollouts_issued": 2048, "rollouts_trained": 2048, "rollouts_dropped": 0},
    resident_gb=4.5,
    seconds={"train": 900.0, "pipeline": 1200.0},
)


def test_the_summary_holds_what_is_promised() -> None:
    figures = OUTCOME.figures()
    assert figures.keys() >= PROMISED
    assert (figures["judge_accuracy_before"], figures["judge_accuracy_low_after"]) == (0.25, 0.4375)
    assert figures["follows_json_after"] == 0.5
    assert figures["judge_accuracy_rise_high"] == 0.3125
    assert json.loads(json.dumps(figures)) == figures


def test_the_screen_shows_both_sides() -> None:
    console = Console(file=io.StringIO(), width=160)
    show_outcome(console, OUTCOME)
    screen = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("as it came", "trained", "25.0%", "50.0%", "+25.0 points", "2048 of 2048"):
        assert shown in screen, shown


def test_the_report_shows_chats_side_by_side(tmp_path: Path) -> None:
    row = {
        "prompt": "Write about a boat.\nUse fewer than 20 words.",
        "before": "Once upon a time\nthere was <b>a boat",
        "after": "A boat came home.",
        "score_before": 0.25,
        "score_after": 1.0,
        "conforms_before": False,
        "conforms_after": True,
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n", encoding="utf8")
    line = {"stage": "train", "step": 1, "time": 0.0, "metrics": {"score": 0.5}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf8")
    (tmp_path / "summary.json").write_text(json.dumps(OUTCOME.figures()), encoding="utf8")
    page = write_report(tmp_path, IN_REPORT).read_text(encoding="utf8")
    for shown in ("as it came ·", "A boat came home.", "&lt;b&gt;a boat", "4.5", "held out)"):
        assert shown in page, shown
    assert "human:" not in page


def test_a_recipe_chooses_its_task() -> None:
    for name, kind in (("quickstart", "docstrings"), ("instruct", "instruct")):
        config = load_config(Path("deploy/recipes") / f"{name}.yaml")
        assert task_of(config) is TASKS[kind]
