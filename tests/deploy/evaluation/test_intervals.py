"""Intervals and win rates against known values and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.evaluation.intervals import best_of_n_kl, bootstrap_mean, wilson_interval, win_rate


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for wins, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(wins, n) == pytest.approx((low, high), abs=6e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_holds_the_share_and_mirrors(n: int, share: float) -> None:
    wins = round(share * n)
    low, high = wilson_interval(wins, n)
    assert 0.0 <= low <= wins / n + 1e-12
    assert wins / n - 1e-12 <= high <= 1.0
    mirrored = wilson_interval(n - wins, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_bootstrap_is_repeatable_and_near_the_normal_interval() -> None:
    data = np.random.default_rng(0).normal(2.0, 1.0, 400).tolist()
    interval = bootstrap_mean(data, 1)
    assert interval == bootstrap_mean(data, 1)
    half = 1.96 * np.std(data) / math.sqrt(len(data))
    normal = interval.mean - half, interval.mean + half
    assert (interval.low, interval.high) == pytest.approx(normal, abs=0.02)


def test_ties_are_left_out_and_reported() -> None:
    found = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 1.0], tie_margin=0.0)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert found.rate.mean == pytest.approx(2 / 3)
    assert found.ties_share == 0.25
    nothing = win_rate([1.0], [1.0], tie_margin=0.0)
    assert (nothing.rate.mean, nothing.ties_share) == (0.5, 1.0)
    assert win_rate([1.05], [1.0], tie_margin=0.1).ties == 1


def test_best_of_n_against_a_literal_sum() -> None:
    # Over m equally likely responses, best-of-n has the k-th with (k^n - (k-1)^n) / m^n.
    for n in (1, 2, 4, 16):
        m = 20_000
        k = np.arange(1, m + 1) / m
        chosen = k**n - np.append(0.0, k[:-1]) ** n
        kl = float(np.sum(chosen * np.log(np.maximum(chosen * m, 1e-300))))
        assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-3)
