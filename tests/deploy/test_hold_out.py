"""Splitting data off for measuring: something is left on either side."""

from __future__ import annotations

import pytest

from common.errors import DataError
from deploy.stages import _hold_out


@pytest.mark.parametrize(("count", "share"), [(2, 0.99), (3, 0.99), (3, 0.01), (100, 0.999)])
def test_both_sides_have_something(count: int, share: float) -> None:
    train, held_out = _hold_out(range(count), share, 0)
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert sorted([*train, *held_out]) == list(range(count))


def test_one_record_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 usable records"):
        _hold_out([1], 0.5, 0)
