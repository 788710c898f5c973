"""Trained and dropped rollouts, in little memory."""

from __future__ import annotations

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from deploy.control.settled import Ranges, Settled


def test_a_million_trained_rollouts_take_no_room() -> None:
    settled = Settled()
    for iteration in range(1000):
        ids = [f"{iteration:06d}-{i:06d}" for i in range(1000)]
        settled.expect(ids)
        for rollout_id in ids:
            settled.add(rollout_id)
    assert len(settled) == 1
    assert len(json.dumps(settled.state())) < 100
    assert "000999-000999" in settled
    assert "001000-000000" not in settled


@given(st.sets(st.integers(0, 60)), st.randoms(use_true_random=False))
def test_ranges_are_the_set_they_stand_for(values: set[int], shuffle: random.Random) -> None:
    order = sorted(values)
    shuffle.shuffle(order)
    ranges = Ranges()
    for value in [*order, *order[:3]]:
        ranges.add(value)
    assert {v for v in range(-1, 62) if v in ranges} == values
    assert len(ranges) == sum(v - 1 not in values for v in values), "no two of them touch"
