"""Scored trajectories that nothing sampled: what the learner is given in tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from common.wire.trajectory import ScoredTrajectory, to_table


def trajectories(rows: int = 24, seed: int = 0, adapter: str = "") -> list[pa.Table]:
    """Scored trajectories of uneven lengths, in two tables."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(rows):
        length = int(rng.integers(1, 9))
        logprobs = rng.normal(-3.0, 0.3, length)
        made.append(
            ScoredTrajectory(
                rollout_id=f"000000-{i:06d}",
                group=i // 2,
                prompt_uid=f"{i}",
                prompt_text="",
                prompt_ids=rng.integers(2, 290, rng.integers(1, 20)).tolist(),
                seed=i,
                adapter=adapter,
                response_ids=rng.integers(2, 290, length).tolist(),
                response_text="",
                behavior_logprobs=logprobs.tolist(),
                finish_reason="eos" if i % 3 else "length",
                policy_version=0,
                weights_fingerprint="",
                actor_id="",
                score=float(rng.normal()),
                score_components={},
                ref_logprobs=(logprobs + rng.normal(0, 0.1, length)).tolist(),
                reward_version=0,
            )
        )
    return [to_table(part, ScoredTrajectory) for part in (made[: rows // 2], made[rows // 2 :])]
