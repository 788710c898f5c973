"""Splitting data off for measuring: something is left on either side."""

from __future__ import annotations

import pytest

from common.errors import DataError
from deploy.stages.encoding import hold_out


@pytest.mark.parametrize(("count", "share"), [(2, 0.99), (3, 0.99), (3, 0.01), (100, 0.999)])
def test_both_sides_have_something(count: int, share: float) -> None:
    train, held_out = hold_out(range(count), share, 0, int)
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert sorted([*train, *held_out]) == list(range(count))


def test_one_record_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 usable records"):
        hold_out([1], 0.5, 0, int)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_there_twice_is_never_on_both_sides(seed: int) -> None:
    data = [*range(10), *range(10)]
    train, held_out = hold_out(data, 0.3, seed, int)
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == sorted(data) and len(held_out) == 6
    with pytest.raises(DataError, match="1 usable records that differ"):
        hold_out([1, 1, 1], 0.5, seed, int)
