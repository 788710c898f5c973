"""The benchmark of the control plane makes tables of the kinds that are on the wire now."""

from __future__ import annotations

from common.data.prompts import EncodedPrompt, PromptStream
from common.wire.trajectory import Rollout, RolloutRequest, ScoredTrajectory, from_table, to_table
from tests.benchmarks.control_plane import MANIFEST, NullReward, NullRollout


def test_its_workers_speak_as_ours_do() -> None:
    prompts = PromptStream([EncodedPrompt(uid="p", text="a", ids=[1])], seed=0)
    requests = to_table(prompts.requests(0, 3, 2), RolloutRequest)
    _, rollouts = NullRollout().generate(requests, MANIFEST)
    assert len(from_table(rollouts, Rollout)) == 6
    facts, scored = NullReward().score(rollouts)
    rows = from_table(scored, ScoredTrajectory)
    assert facts.rollout_ids == tuple(row.rollout_id for row in rows)
    assert facts.scores == tuple(row.score for row in rows)
