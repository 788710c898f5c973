"""Intervals and win rates for evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean or a share, and the interval that it has at a confidence of 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Comparison of two policies on the same prompts."""

    wins: int
    losses: int
    ties: int
    rate: Interval
    """Wins over decided comparisons, 0.5 when none is decided; the interval is Wilson's."""

    @property
    def ties_share(self) -> float:
        """Ties over all comparisons; 0 when there are none."""
        return self.ties / max(1, self.wins + self.losses + self.ties)


def wilson_interval(wins: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the ends of a proportion's score interval (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = wins / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float], seed: int, n: int = 1000, confidence: float = 0.95
) -> Interval:
    """Return the mean and its percentile-bootstrap interval."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(n)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=float(data.mean()), low=float(low), high=float(high))


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float], *, tie_margin: float) -> WinRate:
    """Count how often a beats b; differences up to the margin are ties, left out of the rate."""
    differences = [a - b for a, b in zip(scores_a, scores_b, strict=True)]
    wins = sum(d > tie_margin for d in differences)
    losses = sum(d < -tie_margin for d in differences)
    decided = wins + losses
    low, high = wilson_interval(wins, decided)
    return WinRate(
        wins=wins,
        losses=losses,
        ties=len(differences) - decided,
        rate=Interval(mean=wins / decided if decided else 0.5, low=low, high=high),
    )


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n to its base, in nats: ``log n - (n - 1) / n`` (Stiennon 2020)."""
    return math.log(n) - (n - 1) / n
