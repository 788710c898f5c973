"""Responses that an engine really samples, with what reference and rewards say of them."""

from __future__ import annotations

from collections.abc import Sequence

from actors.generation.engine import GenerationEngine
from common.wire.trajectory import (
    Rollout,
    RolloutRequest,
    ScoredTrajectory,
    extend,
    from_table,
    to_table,
)
from reward_service.models import ReferencePolicy, frozen_pass


def sampled_trajectories(
    engine: GenerationEngine,
    requests: Sequence[RolloutRequest],
    reference: ReferencePolicy,
    scores: Sequence[float] = (0.0,),
    away: float = 0.0,
) -> list[ScoredTrajectory]:
    """What a run would make of these requests, through the records of the wire.

    Args:
        scores: of the rollouts, taken in turn.
        away: added to the log-probabilities that were sampled with.
    """
    rollouts = [
        extend(
            request,
            Rollout,
            response_ids=made.response_ids,
            response_text="",
            behavior_logprobs=[x + away for x in made.logprobs],
            unfiltered_logprobs=made.unfiltered,
            finish_reason=made.finish_reason,
            policy_version=0,
            weights_fingerprint="",
            actor_id="",
        )
        for request, made in zip(requests, engine.generate(requests), strict=True)
    ]
    rollouts = from_table(to_table(rollouts, Rollout), Rollout)
    _, logprobs = frozen_pass(rollouts, 500, None, reference)
    return [
        extend(
            rollout,
            ScoredTrajectory,
            score=scores[i % len(scores)],
            score_components={},
            ref_logprobs=logprobs[i],
            reward_version=0,
        )
        for i, rollout in enumerate(rollouts)
    ]
