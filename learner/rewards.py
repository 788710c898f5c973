"""KL-shaped rewards (Stiennon 2020, section 3.4; Ziegler 2019, arXiv 1909.08593).

``r_t = -kl_coef (logprob_t - ref_logprob_t)`` for every response token, plus the score on the last.
Shape suffixes: B sequences, R response positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def shape_rewards(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    mask_BR: Tensor,
    *,
    kl_coef: float,
) -> Tensor:
    """Rewards ``[B, R]``. The score stands on the last *response* token, never on padding.

    Raises ValueError for a row without a response token (its score would have no place), and for
    a score or log-probability that is not finite.
    """
    lengths = mask_BR.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError("a row has no response token to carry its score")
    rewards = -kl_coef * (logprobs_BR - ref_logprobs_BR).masked_fill(~mask_BR, 0.0)
    rewards = rewards.scatter_add(1, lengths[:, None] - 1, scores_B[:, None].to(rewards.dtype))
    broken = ~rewards.isfinite().all(dim=1)
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise ValueError(f"row {row} has a score or log-probability that is not finite")
    return rewards


def apply_eos_trick(scores_B: Tensor, ended_with_eos_B: Tensor, *, penalty: float) -> Tensor:
    """The penalty in place of the score of a response that never ended (Stiennon's code)."""
    return torch.where(ended_with_eos_B, scores_B, torch.full_like(scores_B, penalty))


class FixedKL:
    """A constant coefficient."""

    def __init__(self, coef: float) -> None:
        _require_finite("KL coefficient", coef)
        self.coef = coef

    def update(self, kl: float, n: int) -> None:
        """Nothing changes. Raises ValueError for a KL that is not finite."""
        _require_finite("KL", kl)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint. Raises ValueError for a coefficient that is not finite."""
        coef = float(state["coef"])
        _require_finite("KL coefficient", coef)
        self.coef = coef


class AdaptiveKL(FixedKL):
    """Ziegler 2019: ``err = clip(kl / target - 1, +-0.2); coef *= 1 + err n / horizon``."""

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
        self.coef *= 1.0 + error * n / self.horizon


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
