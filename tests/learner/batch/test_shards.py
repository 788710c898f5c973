"""Minibatches: every row once, a prompt's responses together, and the order by seed and purpose."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batch.experience import Sequences
from learner.batch.shards import Shards


def sequences(sizes: list[int]) -> Sequences:
    """Prompts of so many responses each, the responses of all of them in turn."""
    prompts = [p for turn in range(max(sizes)) for p, size in enumerate(sizes) if turn < size]
    return Sequences(prompts=[[p] for p in prompts], responses=[[1]] * len(prompts))


def parts_of(of: Sequences, parts: int, *purpose: int | str, seed: int = 0) -> list[list[int]]:
    shards = Shards(seed=seed, budget=100, device=torch.device("cpu"))
    return list(shards.minibatches(of, parts, *purpose))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 99))
def test_rows_are_dealt_once_and_a_prompts_together(
    sizes: list[int], parts: int, iteration: int
) -> None:
    of = sequences(sizes)
    dealt = parts_of(of, parts, "policy", iteration)
    assert sorted(row for part in dealt for row in part) == list(range(len(of)))
    assert len(dealt) == min(parts, len(of))
    assert all(dealt)
    if len(sizes) >= len(dealt) and max(sizes) * len(dealt) <= 2 * len(of):
        prompts = [{of.prompts[row][0] for row in part} for part in dealt]
        assert sum(map(len, prompts)) == len(sizes), "each prompt is in one part"
        assert max(map(len, prompts)) - min(map(len, prompts)) <= 1
    else:
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1, "rows one by one"


def test_one_response_that_is_missing_parts_no_prompt() -> None:
    of = sequences([8, 8, 7, 8])
    assert sorted(map(len, parts_of(of, 4, "policy", 0, 0))) == [7, 8, 8, 8]


def test_the_order_is_a_function_of_seed_and_purpose() -> None:
    of = sequences([4] * 12)
    first = parts_of(of, 3, "policy", 0, 0)
    assert first == parts_of(of, 3, "policy", 0, 0)
    assert first != parts_of(of, 3, "policy", 0, 1)
    assert first != parts_of(of, 3, "policy", 1, 0)
    assert first != parts_of(of, 3, "policy", 0, 0, seed=1)
