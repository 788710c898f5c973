"""What an evaluation while training says of scored responses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.run import RunConfig
from common.wire.trajectory import ScoredTrajectory
from deploy.control.measures import evaluated, measured, pass_at_k
from tests.learner.batch.test_trajectory_log import trajectories


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_solution(
    n: int, data: st.DataObject
) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(
        float(Fraction(sum(map(any, choices)), len(choices)))
    )


def row(group: int, score: float) -> ScoredTrajectory:
    return replace(trajectories("")[0], score=score, group=group)


def test_responses_to_one_prompt_are_counted_together() -> None:
    scores = {0: [1.0, 0.0, 0.0, 0.0], 1: [0.0] * 4, 2: [1.0] * 4}
    rows = [row(group, score) for group, of in scores.items() for score in of]
    found = measured(rows, solved=0.5)
    assert found["score"] == pytest.approx(5 / 12)
    assert found["pass@1"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert found["pass@2"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["pass@4"] == pytest.approx((1.0 + 0 + 1) / 3)
    assert "pass@8" not in found and "pass@1" not in measured(rows, solved=None)
    # A response of one prompt was given up: it is not among those that pass@4 is known of.
    assert measured(rows[1:], solved=0.5)["pass@4"] == pytest.approx((0 + 1) / 2)
    assert measured(rows[1:], solved=0.5)["pass@2"] == pytest.approx((0 + 0 + 1) / 3)
    nearly = [row(0, float(np.float32(0.9)))]
    assert measured(nearly, solved=0.9)["pass@1"] == 1.0, "scores are float32"


def test_each_source_has_a_score_of_its_own() -> None:
    rows = [
        replace(row(0, score), source=source)
        for source, score in (("sums", 1.0), ("a/b", 0.0), ("sums", 0.5))
    ]
    found = measured(rows, solved=None)
    assert (found["score/sums"], found["score/a:b"], found["score"]) == (0.75, 0.0, 0.5)
    assert not [name for name in measured([row(0, 1.0)], solved=None) if name.startswith("score/")]


@pytest.mark.parametrize(
    ("settings", "of_prompts"),
    [
        ({}, [0.5, 1.0, 0.0]),
        ({"metric": "pass@2", "solved": 1, "samples": 2}, [1.0, 1.0, 0.0]),
        ({"metric": "component/judge"}, [0.2, 0.6]),  # of the third it said nothing
        ({"metric": "greedy_score", "greedy": True}, [1.0, 1.0, 0.0]),
    ],
)
def test_the_error_of_the_metric_is_over_prompts(
    settings: dict[str, Any], of_prompts: list[float]
) -> None:
    """Two answers to each of three prompts, and a greedy one."""
    judge = {"kind": "judge", "target": "http://localhost/v1", "model": "m", "rubric": "short"}
    config = RunConfig.model_validate(
        {
            "evaluate": {"every": 1, **settings},
            "reward_service": {
                "components": {"reward_model": {}, "judge": {**judge, "evaluation_only": True}}
            },
        }
    )
    said = [(0, 1.0, 0.2), (0, 0.0, None), (1, 1.0, 0.5), (1, 1.0, 0.7), (2, 0.0, None)]
    rows = [
        replace(row(group, score), score_components={} if mark is None else {"judge": mark})
        for group, score, mark in [*said, (2, 0.0, None)]
    ]
    rows += [replace(row(group, s), greedy=True) for group, s in ((0, 1.0), (1, 1.0), (2, 0.0))]
    found = evaluated(rows, config)
    error = float(np.std(of_prompts, ddof=1)) / len(of_prompts) ** 0.5
    assert found["metric_error"] == pytest.approx(error)
    assert found["unjudged/judge"] == 3
    assert "metric_error" not in evaluated(rows[:2], config)
