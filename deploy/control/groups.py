"""Which rollouts are left alone, where an estimator compares the responses of one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common.wire.trajectory import RolloutRequest


def lone(requests: Sequence[RolloutRequest], least: int) -> frozenset[str]:
    """Rollouts of an iteration's prompts that have fewer than `least` responses among these."""
    size = Counter(request.group for request in requests)
    return frozenset(r.rollout_id for r in requests if size[r.group] < least)
