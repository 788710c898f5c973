"""Rollouts of mixed lengths, as actors would send them, and an impatient HTTP scorer."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.wire.trajectory import Rollout
from reward_service.http_scorer import HttpScorer
from reward_service.http_settings import HttpScorerSettings
from reward_service.samples import Sample


def rollouts(count: int, *, seed: int = 0, vocab: int = 200, prefix: str = "0") -> list[Rollout]:
    """Prompts of 1 to 9 and responses of 1 to 8 random tokens; the text spells the index."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        prompt = rng.integers(2, vocab, rng.integers(1, 10)).tolist()
        response = rng.integers(2, vocab, rng.integers(1, 9)).tolist()
        made.append(
            Rollout(
                rollout_id=f"{prefix}-{index:06d}",
                group=index,
                prompt_uid=f"uid-{index}",
                prompt_text=f"prompt {index}",
                prompt_ids=prompt,
                seed=index,
                response_ids=response,
                response_text=str(index),
                behavior_logprobs=[-0.5] * len(response),
                finish_reason="eos" if index % 2 else "length",
                policy_version=3,
                weights_fingerprint="abc",
                actor_id="rollout-0",
            )
        )
    return made


def requests(count: int) -> list[Sample]:
    """Requests r0, r1, ... whose responses spell their number."""
    return [Sample(rollout_id=f"r{i}", prompt=f"ask {i}", response=str(i)) for i in range(count)]


def scorer(url: str, **changes: Any) -> HttpScorer:
    """Waits that are short, and a circuit that never opens unless the test is about it."""
    quick = {"backoff_s": 0.002, "max_backoff_s": 0.02, "open_after": 10_000, "timeout_s": 20.0}
    return HttpScorer(HttpScorerSettings(url=url, **{**quick, **changes}))
