"""Schedules of learning rates and of PPG's phases: pure functions of step or iteration."""

from __future__ import annotations

import math

from common.config.stages import PpgConfig


def warmup_cosine(step: int, total: int, *, warmup: float, floor: float = 0.1) -> float:
    """Return the factor of the peak rate: a linear warm-up, then a cosine.

    Args:
        step: from 0.
        total: steps in all.
        warmup: share of the steps that warm up.
        floor: the last factor.
    """
    ramp = max(1, math.ceil(warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, total - ramp)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def linear_to_zero(step: int, total: int) -> float:
    """Return the factor of the first rate: 1 at step 0, 0 at step `total`."""
    return max(0.0, 1.0 - step / total)


def auxiliary_phase_due(ppg: PpgConfig | None, iteration: int) -> bool:
    """Return whether PPG's auxiliary phase follows this iteration's policy phase.

    It follows each `n_pi`-th; without PPG settings there is none.
    """
    return ppg is not None and (iteration + 1) % ppg.n_pi == 0
