"""How many rollout actors a run wants: more when the learner waits, fewer when they are idle."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.workers import ActorBounds

_WAITS = 0.25
"""A learner that waits for more of its time than this is short of rollouts."""
_HARDLY_WAITS = 0.05
_BUSY = 0.5
"""More actors help only if those there are have this share of the waiting time filled."""
_IDLE = 0.5
"""Actors idle for more of the time than this, and not waited for, are too many."""
_PATIENCE = 3
"""Iterations in a row that must agree; so also the fewest between two changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One iteration, as shares of its time."""

    learner_waits: float
    """Of the iteration, the learner waited for rollouts."""
    actors_busy: float
    """Of all actors' time together, they generated or loaded weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Iterations in a row that asked for more (positive) or fewer actors (negative)."""

    streak: int = 0


def decide(size: int, bounds: ActorBounds, load: Load, trend: Trend) -> tuple[int, Trend]:
    """Return the next size and the trend to remember; a quarter more at a time, or one fewer.

    One measurement changes nothing, and one that disagrees starts the count anew, so that a run
    between two sizes does not swing.
    """
    wish = _wish(load)
    streak = trend.streak + wish if wish * trend.streak >= 0 and wish else wish
    if abs(streak) < _PATIENCE:
        return min(max(size, bounds.min), bounds.max), Trend(streak=streak)
    step = max(1, size // 4) if streak > 0 else -1
    return min(max(size + step, bounds.min), bounds.max), Trend()


def _wish(load: Load) -> int:
    waits, busy = load.learner_waits, load.actors_busy
    if waits > _WAITS and busy >= _BUSY * waits:
        return 1
    too_fast = waits < _HARDLY_WAITS and busy < 1.0 - _IDLE
    too_many = busy < 0.5 * _BUSY * waits
    return -1 if too_fast or too_many else 0
