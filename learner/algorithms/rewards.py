"""KL-shaped rewards (Stiennon 2020, section 3.4; Ziegler 2019, arXiv 1909.08593).

``r_t = -kl_coef (logprob_t - ref_logprob_t)`` for every response token, plus the score on the last.
Shape suffixes: B sequences, R response positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learner.algorithms.gae import masked_moments, within_rounding
from learner.algorithms.ppo import kl_k1


class Rewards(NamedTuple):
    """The two parts of the rewards, ``[B, R]``, 0 outside the mask."""

    scores: Tensor
    """The score on the last response token, 0 on the others."""
    penalties: Tensor
    """-kl_coef (logprob - ref_logprob)."""

    @property
    def total(self) -> Tensor:
        """Rewards per token."""
        return self.scores + self.penalties


def reward_parts(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    mask_BR: Tensor,
    *,
    kl_coef: float,
) -> Rewards:
    """Score and penalty. The score stands on the last *response* token, never on padding.

    Both log-probabilities are of whole distributions, without a filter: what a nucleus leaves out
    would count as a distance from the reference.

    Raises ValueError for a row without a response token (its score would have no place), and for
    a score or log-probability that is not finite.
    """
    lengths = mask_BR.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError("a row has no response token to carry its score")
    distances = kl_k1(logprobs_BR - ref_logprobs_BR).masked_fill(~mask_BR, 0.0)
    last = lengths[:, None] - 1
    scores = torch.zeros_like(distances)
    scores = scores.scatter(1, last, scores_B[:, None].to(scores.dtype))
    broken = ~(scores + distances).isfinite().all(dim=1)
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise ValueError(f"row {row} has a score or log-probability that is not finite")
    return Rewards(scores, -kl_coef * distances)


def apply_eos_trick(scores_B: Tensor, ended_B: Tensor, *, penalty: float) -> Tensor:
    """``min(score, mean + penalty std)`` for a response that never ended; the others stay.

    Mean and population std are of the scores of the responses that ended, so that what it costs
    follows scale and shift of the scores. Where these have no spread (none or one ended, or all
    score the same) the bound is the smaller of `penalty` itself and of what those score.

    Departure: Stiennon's code puts the penalty in place of the score. Where scores are lower than
    the penalty, never ending would then pay.

    Args:
        ended_B: bool.
        penalty: 0 or less.
    """
    bound = penalty
    if bool(ended_B.any()):
        mean, variance, _ = masked_moments(scores_B, ended_B)
        if within_rounding(scores_B, ended_B):
            bound = min(penalty, float(mean))
        else:
            bound = float(mean + penalty * variance.sqrt())
    return torch.where(ended_B, scores_B, scores_B.clamp(max=bound))


class FixedKL:
    """A constant coefficient."""

    def __init__(self, coef: float) -> None:
        self.coef = _coefficient(coef)

    def update(self, kl: float, n: int) -> None:
        """Nothing changes. Raises ValueError for a KL that is not finite."""
        _require_finite("KL", kl)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint. Raises ValueError for a coefficient that is negative or not finite."""
        self.coef = _coefficient(float(state["coef"]))


class AdaptiveKL(FixedKL):
    """Ziegler 2019: ``err = clip(kl / target - 1, +-0.2); coef *= 1 + err n / horizon``.

    Departure: ``n / horizon`` counts as 1 at most. A batch of several horizons is one measurement,
    and from five of them on the factor would be negative.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Move towards the target after `n` rollouts of mean KL `kl` (nats per response).

        Raises ValueError, changing nothing, for a KL that is not finite.
        """
        _require_finite("KL", kl)
        error = min(0.2, max(-0.2, kl / self.target - 1.0))
        self.coef *= 1.0 + error * min(1.0, n / self.horizon)


def _coefficient(coef: float) -> float:
    _require_finite("KL coefficient", coef)
    if coef < 0.0:
        raise ValueError(f"KL coefficient is {coef}: it would pay for leaving the reference")
    return coef


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
