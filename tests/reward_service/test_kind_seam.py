"""A new kind of reward component needs its settings and its scorer, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from common.config.base import PositiveInt
from common.config.recipe import load_config
from common.config.rewards import RewardComponent
from common.config.run import RunConfig
from common.wire.trajectory import ScoredTrajectory, from_table
from reward_service.samples import Sample
from reward_service.scorers import ScoreResult
from reward_service.service import SCORERS
from tests.reward_service.samples import rollouts
from tests.reward_service.test_service import table, worker


class BrevityScorer:
    def __init__(self, settings: RewardComponent) -> None:
        self.letters: int = settings.model_dump()["letters"]

    def score(self, requests: Sequence[Sample]) -> list[ScoreResult]:
        scores = [float(self.letters - len(r.response)) for r in requests]
        return [
            ScoreResult(rollout_id=r.rollout_id, score=s)
            for r, s in zip(requests, scores, strict=True)
        ]


def test_a_kind_of_ones_own(workspace: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardComponent, "kinds", {**RewardComponent.kinds})

    class Brevity(RewardComponent):
        kind: Literal["brevity"] = "brevity"
        letters: PositiveInt = 9

    monkeypatch.setitem(SCORERS, Brevity, BrevityScorer)
    config = load_config(None, ["reward_service.components.short={kind: brevity, letters: 7}"])
    assert config.reward_service.components["short"] == Brevity(letters=7)
    scorer = worker(workspace, {"short": {"kind": "brevity", "letters": 7}})
    _, scored = scorer.score(table(rollouts(3)))
    for each in from_table(scored, ScoredTrajectory):
        assert each.score == 7 - len(each.response_text)
