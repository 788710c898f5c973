"""Seeds, uniforms and orders are functions of what they are for, and stay what they were."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.randomness import ShuffledIndex, derive_seed, shuffled_order, uniforms


def test_seeds_are_functions_of_their_parts_and_of_where_parts_end() -> None:
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    many = [derive_seed(0, "a", 1), derive_seed(0, "a1"), derive_seed("0", "a", "2")]
    assert len(set(many)) == 3
    assert all(0 <= seed < 2**64 for seed in many)


def test_values_stay_what_runs_of_before_drew() -> None:
    assert derive_seed(0, "policy") == 16535038507678857115
    drawn = uniforms(np.array([7], dtype=np.uint64), np.arange(3)).tolist()
    assert drawn == [0.3898297483912715, 0.01678829452815611, 0.9007606806068834]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_uniforms_are_a_function_of_seed_and_position(seed: int, position: int) -> None:
    seeds, at = np.array([seed], dtype=np.uint64), np.array([position], dtype=np.uint64)
    alone = uniforms(seeds, at)
    batch = uniforms(
        np.array([1, seed, 2], dtype=np.uint64), np.array([9, position, 9], dtype=np.uint64)
    )
    assert float(alone[0]) == float(batch[1])
    assert 0.0 <= float(alone[0]) < 1.0
    assert float(uniforms(seeds, at + np.uint64(1))[0]) != float(alone[0])


@given(st.integers(1, 200), st.integers(0, 2**63), st.integers(0, 1000))
def test_shuffled_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = shuffled_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == shuffled_order(n, seed, epoch).tolist()


def test_shuffled_order_is_the_same_everywhere_and_differs_by_seed_and_epoch() -> None:
    assert shuffled_order(8, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    orders = {tuple(shuffled_order(50, s, e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@given(st.integers(1, 12), st.integers(0, 60), st.lists(st.integers(0, 30), max_size=6))
def test_stream_resumes_at_any_position(n: int, start: int, sizes: list[int]) -> None:
    whole = ShuffledIndex(n, 7).next_batch(start + sum(sizes))
    resumed = ShuffledIndex(n, 7, position=start)
    assert [i for size in sizes for i in resumed.next_batch(size)] == whole[start:]
    assert resumed.position == start + sum(sizes)


def test_every_epoch_holds_every_index_once() -> None:
    stream = ShuffledIndex(5, 0)
    drawn = [i for _ in range(5) for i in stream.next_batch(3)]
    assert [Counter(drawn[k : k + 5]) for k in (0, 5, 10)] == [Counter(range(5))] * 3
    with pytest.raises(ValueError, match="n >= 1"):
        ShuffledIndex(0, 0)
