"""Generalised advantage estimation (Schulman 2015, arXiv 1506.02438) and whitening.

``delta_t = r_t + gamma V_{t+1} - V_t``,  ``A_t = delta_t + gamma lambda A_{t+1}``

Departures: the value after the last response token is 0 (a response is an episode that ends), and
everything outside the mask is 0. Shape suffixes: B sequences, R response positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Scores, values and log-probabilities arrive in float32: numbers whose spread is no larger than
this share of the largest of them are equal, and dividing by it would make noise the signal."""


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantages + values), both ``[B, R]``, zero outside the mask.

    Args:
        mask_BR: bool, True = a real response token (a contiguous prefix of each row).
    """
    # Filled, not multiplied: padding may hold NaN, and NaN * 0 is NaN.
    rewards = rewards_BR.masked_fill(~mask_BR, 0.0)
    values = values_BR.masked_fill(~mask_BR, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following).masked_fill(~mask_BR[:, t], 0.0)
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population variance and count of the entries where `mask` is True, in float64.

    Raises ValueError for an empty mask.
    """
    count = mask.sum(dtype=torch.float64)
    if not count:
        raise ValueError("nothing to average: the mask is empty")
    mean = x.double().masked_fill(~mask, 0.0).sum() / count
    variance = (x.double() - mean).masked_fill(~mask, 0.0).square().sum() / count
    return mean, variance, count


def within_rounding(x: Tensor, mask: Tensor) -> bool:
    """Whether the entries where `mask` is True are all equal, as far as float32 can tell.

    Raises ValueError for an empty mask.
    """
    _, variance, _ = masked_moments(x, mask)
    largest = x.double().masked_fill(~mask, 0.0).abs().max()
    return bool(variance.sqrt() <= ROUNDING * largest)


def whiten(x_BR: Tensor, mask_BR: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the mask; zero outside it.

    Moments are the population's (Stiennon 2020's code), not the sample's. Numbers that are equal
    but for their rounding have no deviation to be divided by: they become exactly 0. With
    `shift_mean=False` the mean is kept.
    """
    mean, variance, _ = masked_moments(x_BR, mask_BR)
    whitened = torch.zeros_like(x_BR, dtype=torch.float64)
    if not within_rounding(x_BR, mask_BR):
        whitened = (x_BR.double() - mean) * (variance + eps).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask_BR, 0.0).to(x_BR.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - var(returns - values) / var(returns)`` over the mask: 1 for values that are right, 0
    for a constant. 0 also where returns are all equal: there is nothing to explain.

    Raises ValueError for an empty mask.
    """
    if within_rounding(returns, mask):
        return 0.0
    _, residual, _ = masked_moments(returns.double() - values.double(), mask)
    _, spread, _ = masked_moments(returns, mask)
    return float(1.0 - residual / spread)
