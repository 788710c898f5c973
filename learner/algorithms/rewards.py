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
from learner.algorithms.kl import kl_k1
from learner.algorithms.shapes import require_shape


class Rewards(NamedTuple):
    """The two parts of the rewards, 0 outside the mask."""

    scores_BR: Tensor
    """The score on the last response token, less what of it is on others."""
    penalties_BR: Tensor
    """-kl_coef (logprob - ref_logprob)."""

    @property
    def total_BR(self) -> Tensor:
        """Rewards per token."""
        return self.scores_BR + self.penalties_BR

    def per_sequence(self) -> tuple[Tensor, Tensor]:
        """Return the score and the summed penalty of each sequence, both ``[B]``."""
        return self.scores_BR.sum(1), self.penalties_BR.sum(1)


def reward_parts(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    mask_BR: Tensor,
    *,
    kl_coef: float,
    token_scores_BR: Tensor | None = None,
) -> Rewards:
    """Return score and penalty of each token. The score is on the last *response* token.

    Rewards on single tokens are a part of the score: what is left of it is on the last one.

    Args:
        scores_B: one score per sequence, all of it.
        logprobs_BR: of the policy, of the whole distribution without a filter: what a nucleus
            leaves out would count as a distance from the reference.
        ref_logprobs_BR: of the reference policy, likewise.
        mask_BR: bool, True = a response token.
        kl_coef: weight of the distance.
        token_scores_BR: what of the scores belongs to single tokens; None: nothing.

    Raises:
        ValueError: a row has no response token, which its score would be on, or a score or
            log-probability is not finite.
    """
    require_shape(2, logprobs_BR, ref_logprobs_BR, mask_BR)
    require_shape(1, scores_B, mask_BR[:, 0])
    lengths_B = mask_BR.sum(dim=1)
    if bool((lengths_B == 0).any()):
        raise ValueError("a row has no response token to carry its score")
    distances_BR = kl_k1(logprobs_BR - ref_logprobs_BR).masked_fill(~mask_BR, 0.0)
    last_B1 = lengths_B[:, None] - 1
    scores_BR = torch.zeros_like(distances_BR)
    if token_scores_BR is not None:
        require_shape(2, token_scores_BR, mask_BR)
        scores_BR = token_scores_BR.masked_fill(~mask_BR, 0.0).to(scores_BR.dtype)
    rest_B = scores_B.to(scores_BR.dtype) - scores_BR.sum(dim=1)
    scores_BR = scores_BR.scatter_add(1, last_B1, rest_B[:, None])
    broken_B = ~(scores_BR + distances_BR).isfinite().all(dim=1)
    if bool(broken_B.any()):
        row = int(broken_B.nonzero()[0])
        raise ValueError(f"row {row} has a score or log-probability that is not finite")
    return Rewards(scores_BR, -kl_coef * distances_BR)


def apply_eos_trick(scores_B: Tensor, ended_B: Tensor, *, penalty: float) -> Tensor:
    """Return ``min(score, mean + penalty std)`` of a response that never ended, ``[B]``.

    Mean and population std are of the scores of the responses that ended, so that what it costs
    follows scale and shift of the scores. Where these have no spread (none or one ended, or all
    score the same) the bound is the smaller of `penalty` itself and of what those score.

    Departure: Stiennon's code puts the penalty in place of the score. Where scores are lower than
    the penalty, never ending would then pay.

    Args:
        scores_B: one score per sequence; those of responses that ended stay.
        ended_B: bool, the response ended by itself.
        penalty: 0 or less, in deviations.
    """
    require_shape(1, scores_B, ended_B)
    bound = penalty
    if bool(ended_B.any()):
        mean, variance, _ = masked_moments(scores_B, ended_B)
        if within_rounding(scores_B, ended_B):
            bound = min(penalty, float(mean))
        else:
            bound = float(mean + penalty * variance.sqrt())
    return torch.where(ended_B, scores_B, scores_B.clamp(max=bound))


def overlong_penalty(lengths_B: Tensor, *, longest: int, buffer: int, penalty: float) -> Tensor:
    """Return what long responses lose of their scores, float64 ``[B]``.

    Nothing up to `buffer` tokens before the limit, then in proportion, `penalty` at the limit: the
    soft overlong punishment of DAPO (Yu 2025, arXiv 2503.14476, equation 13).

    Args:
        lengths_B: response tokens.
        longest: the most that a response can have.
        buffer: tokens over which the penalty grows.
        penalty: at the limit.
    """
    beyond_B = lengths_B.double() - (longest - buffer)
    return penalty * (beyond_B / buffer).clamp(0.0, 1.0)


class FixedKL:
    """A constant coefficient of the KL penalty."""

    def __init__(self, coef: float) -> None:
        """Begin with a coefficient, 0 or more."""
        self.coef = _coefficient(coef)

    def update(self, kl: float, n: int) -> None:
        """Check what was measured; nothing changes.

        Args:
            kl: mean KL to the reference, in nats per response.
            n: rollouts that it is the mean of.

        Raises:
            ValueError: the KL is not finite.
        """
        _require_finite("KL", kl)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the coefficient is negative or not finite.
        """
        self.coef = _coefficient(float(state["coef"]))


class AdaptiveKL(FixedKL):
    """A coefficient that follows the KL: it grows while the policy is further off than wanted.

    ``err = clip(kl / target - 1, +-0.2); coef *= 1 + err n / horizon`` (Ziegler 2019).
    Departure: ``n / horizon`` counts as 1 at most. A batch of several horizons is one measurement,
    and from five of them on the factor would be negative.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        """Begin with a coefficient.

        Args:
            coef: the first one, 0 or more.
            target: the KL that is wanted, in nats per response.
            horizon: rollouts within which the coefficient answers a deviation.
        """
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Move towards the target.

        Args:
            kl: mean KL to the reference, in nats per response.
            n: rollouts that it is the mean of.

        Raises:
            ValueError: the KL is not finite; nothing has changed.
        """
        _require_finite("KL", kl)
        error = min(0.2, max(-0.2, kl / self.target - 1.0))
        self.coef *= 1.0 + error * min(1.0, n / self.horizon)


def kl_controller(coef: float, target: float | None, horizon: int) -> FixedKL:
    """Return a controller of the KL penalty: adaptive with a target, else fixed."""
    return FixedKL(coef) if target is None else AdaptiveKL(coef, target, horizon)


def _coefficient(coef: float) -> float:
    _require_finite("KL coefficient", coef)
    if coef < 0.0:
        raise ValueError(f"KL coefficient is {coef}: it would pay for leaving the reference")
    return coef


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
