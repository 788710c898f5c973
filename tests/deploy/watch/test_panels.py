"""Which curves the live page draws: everything of the catalogue, as it was logged."""

from __future__ import annotations

import math
import time

import pytest

from common.metric_catalogue import Logged
from deploy.run_folder.log_lines import HELD_OUT, Line
from deploy.watch.panels import MOST_POINTS, TABS, columns_of, drawn


def lines(count: int, *names: str) -> list[Line]:
    return [
        Line(
            stage="train", step=step, metrics={name: step + i / 10 for i, name in enumerate(names)}
        )
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize("metric", Logged)
def test_every_metric_that_has_a_curve_is_drawn(metric: Logged) -> None:
    if metric.facts.when == "at the end of the stage":
        return  # one number, no curve
    stages = {
        stage
        for panels in TABS.values()
        for panel in panels
        if metric in panel.metrics
        for stage in panel.stages
    }
    assert stages, f"{metric} is on no tab"
    assert stages <= {"sft", "reward", "train", HELD_OUT}
    assert set(metric.facts.stages) & stages, f"{metric} is never logged where it is drawn"


def test_a_curve_is_what_was_logged() -> None:
    (panel,) = (p for p in drawn("outcome", columns_of({"train": lines(5, "kl")})) if p.curves)
    assert (panel.title, panel.unit, panel.every) == ("KL to the reference", "nats per response", 1)
    assert panel.steps == [1, 2, 3, 4, 5]
    (curve,) = panel.curves
    assert (curve.label, curve.values, curve.last) == ("kl", [1, 2, 3, 4, 5], 5)


def test_stages_and_labels_share_a_panel() -> None:
    columns = columns_of(
        {
            "train": lines(3, "score"),
            HELD_OUT: [
                Line(stage=HELD_OUT, step=0, metrics={"score": 0.5, "pass@16": 0.4, "pass@8": 0.3}),
                Line(stage=HELD_OUT, step=2, metrics={"score": 0.75, "pass@8": math.nan}),
            ],
        }
    )
    by_title = {panel.title: panel for panel in drawn("outcome", columns)}
    score = by_title["Score"]
    assert score.steps == [0, 1, 2, 3]
    assert {c.label: c.values for c in score.curves} == {
        "training, score": [None, 1, 2, 3],
        "held-out, score": [0.5, None, 0.75, None],
    }
    assert [c.label for c in by_title["Held-out, solved"].curves] == ["pass@8", "pass@16"]


def test_long_curves_are_means_and_keep_the_last_value() -> None:
    count = 10 * MOST_POINTS + 3
    (panel,) = drawn("learning", columns_of({"train": lines(count, "entropy")}))
    assert panel.every == 11
    assert len(panel.steps) <= MOST_POINTS
    assert panel.steps[0] == panel.curves[0].values[0] == 6.0, "the mean of 1 to 11"
    assert panel.curves[0].last == count


def test_ten_thousand_iterations_are_quick() -> None:
    names = [str(metric) for metric in Logged if not metric.labels]
    long = {"train": lines(10_000, *names)}
    begin = time.perf_counter()
    columns = columns_of(long)
    for tab in TABS:
        drawn(tab, columns)
    assert time.perf_counter() - begin < 20  # 0.9 s alone; a square would be hours
