"""Generalised advantage estimation (Schulman 2015, arXiv 1506.02438) and whitening.

``delta_t = r_t + gamma V_{t+1} - V_t``,  ``A_t = delta_t + gamma lambda A_{t+1}``

Departures: the value after the last response token is 0 (a response is an episode that ends), and
everything outside the mask is 0.
Shape suffixes: B sequences, R response positions; tensors without one may have any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.algorithms.shapes import require_shape

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Scores, values and log-probabilities arrive in float32: numbers whose spread is no larger than
this share of the largest of them are equal, and dividing by it would make noise the signal."""


def gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (advantages + values), ``[B, R]``, zero outside the mask.

    Args:
        rewards_BR: float, the reward of each response token.
        values_BR: float, V of the state that each token was sampled in.
        mask_BR: bool, True = a response token (a contiguous prefix of each row).
        gamma: discount from token to token.
        gae_lambda: lambda, one for all or ``[B]``; 1 is the whole return, 0 the next value alone.
    """
    require_shape(2, rewards_BR, values_BR, mask_BR)
    # Filled, not multiplied: padding may hold NaN, and NaN * 0 is NaN.
    rewards_BR = rewards_BR.masked_fill(~mask_BR, 0.0)
    values_BR = values_BR.masked_fill(~mask_BR, 0.0)
    advantages_BR = torch.zeros_like(rewards_BR)
    following_B = torch.zeros_like(rewards_BR[:, 0])
    next_value_B = torch.zeros_like(following_B)
    for t in range(rewards_BR.shape[1] - 1, -1, -1):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        following_B = (delta_B + gamma * gae_lambda * following_B).masked_fill(~mask_BR[:, t], 0.0)
        advantages_BR[:, t] = following_B
        next_value_B = values_BR[:, t]
    return advantages_BR, advantages_BR + values_BR


def length_lambda(mask_BR: Tensor, *, alpha: float) -> Tensor:
    """Return ``lambda_i = 1 - 1 / (alpha |y_i|)``, at least 0, float64 ``[B]``.

    A score at the end of a long response then reaches its first tokens as it does those of a short
    one (VAPO, Yue 2025, arXiv 2504.05118, equation 8; alpha is 0.05 there).

    Args:
        mask_BR: bool, True = a response token.
        alpha: the larger, the nearer to 1.
    """
    lengths_B = mask_BR.sum(dim=1).clamp(min=1).double()
    return (1.0 - 1.0 / (alpha * lengths_B)).clamp(min=0.0)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, population variance and count of what `mask` selects, in float64.

    Args:
        x: numbers of any shape.
        mask: bool, of the same shape, True = counted.

    Raises:
        ValueError: the mask is empty, or of another shape.
    """
    require_shape(x.dim(), x, mask)
    count = mask.sum(dtype=torch.float64)
    if not count:
        raise ValueError("nothing to average: the mask is empty")
    mean = x.double().masked_fill(~mask, 0.0).sum() / count
    variance = (x.double() - mean).masked_fill(~mask, 0.0).square().sum() / count
    return mean, variance, count


def within_rounding(x: Tensor, mask: Tensor) -> bool:
    """Whether all that `mask` selects is equal, as far as float32 can tell.

    Args:
        x: numbers of any shape.
        mask: bool, of the same shape, True = counted.

    Raises:
        ValueError: the mask is empty.
    """
    _, variance, _ = masked_moments(x, mask)
    largest = x.double().masked_fill(~mask, 0.0).abs().max()
    return bool(variance.sqrt() <= ROUNDING * largest)


def whiten(x_BR: Tensor, mask_BR: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Return ``(x - mean) / sqrt(variance + eps)`` over the mask, zero outside it, ``[B, R]``.

    Moments are the population's (Stiennon 2020's code), not the sample's. Numbers that are equal
    but for their rounding have no deviation to be divided by: they become exactly 0.

    Args:
        x_BR: what is whitened, over the whole batch.
        mask_BR: bool, True = a response token.
        shift_mean: False keeps the mean.
        eps: keeps the quotient of a small variance finite.
    """
    mean, variance, _ = masked_moments(x_BR, mask_BR)
    whitened_BR = torch.zeros_like(x_BR, dtype=torch.float64)
    if not within_rounding(x_BR, mask_BR):
        whitened_BR = (x_BR.double() - mean) * (variance + eps).rsqrt()
    if not shift_mean:
        whitened_BR = whitened_BR + mean
    return whitened_BR.masked_fill(~mask_BR, 0.0).to(x_BR.dtype)


def explained_variance(values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """Return ``1 - var(returns - values) / var(returns)`` over the mask.

    1 for values that are right, 0 for a constant. 0 also where returns are all equal: there is
    nothing to explain.

    Args:
        values_BR: what was predicted of the returns.
        returns_BR: what they became.
        mask_BR: bool, True = a response token.

    Raises:
        ValueError: the mask is empty.
    """
    require_shape(2, values_BR, returns_BR, mask_BR)
    if within_rounding(returns_BR, mask_BR):
        return 0.0
    _, residual, _ = masked_moments(returns_BR.double() - values_BR.double(), mask_BR)
    _, spread, _ = masked_moments(returns_BR, mask_BR)
    return float(1.0 - residual / spread)
