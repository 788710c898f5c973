"""Proximal policy optimisation (Schulman 2017, arXiv 1707.06347) and its decoupled form.

``L = -min(rho A, clip(rho, 1 - eps, 1 + eps) A)`` with ``rho = pi / pi_prox``. Where the samples'
log-probabilities are not pi_prox's, for they are older or were computed in another precision, each
term carries the truncated weight ``min(pi_prox / pi_behav, cap)`` (decoupled PPO: Hilton 2022,
arXiv 2110.00641).

Losses are *sums over the mask divided by `normalizer`*, the token count of the whole minibatch over
all ranks and micro-batches, so that adding up pieces gives the loss of the whole.
Shape suffixes: B sequences, R response positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from learner.algorithms.gae import ROUNDING, masked_moments


class PolicyLoss(NamedTuple):
    """`loss` to differentiate; the rest are detached sums over the mask."""

    loss: Tensor
    clipped: Tensor
    """Tokens whose gradient the clip removed."""
    k3: Tensor
    """Sum of the non-negative KL estimator of KL(proximal || now)."""


class ValueLoss(NamedTuple):
    """`loss` to differentiate, and the detached count of clipped tokens."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    normalizer: float,
    importance_weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped objective; all tensors ``[B, R]``, mask bool (True = trained on)."""
    # Padding may hold anything, so it is set to "no change" before exp can overflow.
    delta = (logprobs - proximal_logprobs).masked_fill(~mask, 0.0)
    ratio = delta.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages
    term = -torch.minimum(unclipped, clipped)
    if importance_weights is not None:
        term = term * importance_weights
    loss = term.masked_fill(~mask, 0.0).sum() / normalizer
    with torch.no_grad():
        hit = ((clipped < unclipped) & mask).sum()
        k3 = (kl_k3(-delta) * mask).sum()
    return PolicyLoss(loss, hit, k3)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip_range: float | None,
    normalizer: float,
) -> ValueLoss:
    """``0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2)`` over the mask, ``[B, R]`` tensors.

    `value_clip_range` is c, None leaves the clip out. Departure: Stiennon's code has a constant c,
    which fits scores of deviation 1; callers here take a share of `value_unit`. From returns near
    50 values would be 250 iterations of c = 0.2 away.
    """
    error = (values - returns).square()
    hit = torch.zeros((), dtype=torch.int64, device=values.device)
    if value_clip_range is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        near_error = (near - returns).square()
        hit = ((near_error > error) & mask).sum()
        error = torch.maximum(error, near_error)
    return ValueLoss(0.5 * error.masked_fill(~mask, 0.0).sum() / normalizer, hit.detach())


def value_unit(old_values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """What values are measured in, so that no setting depends on scale and shift of the scores:
    the deviation of a whole batch's returns, or ``RMS(R - V_old)`` where that is more."""
    missed = (returns.double() - old_values.double()).masked_fill(~mask, 0.0)
    return unit_of(float(missed.square().sum()), returns, mask)


def unit_of(missed: float, returns: Tensor, mask: Tensor) -> float:
    """As `value_unit`, from the sum of the squares that values miss returns by. 1 where all is
    equal but for its rounding: there is nothing to measure."""
    _, variance, count = masked_moments(returns, mask)
    unit = math.sqrt(max(float(variance), missed / float(count)))
    largest = float(returns.double().masked_fill(~mask, 0.0).abs().max())
    return unit if unit > ROUNDING * largest else 1.0


def entropy(logits_BRV: Tensor) -> Tensor:
    """Entropy ``[B, R]`` of the full distribution at temperature 1, in nats."""
    logprobs = logits_BRV.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def importance_weights(
    proximal_logprobs: Tensor, behavior_logprobs: Tensor, *, cap: float
) -> Tensor:
    """Truncated ``min(pi_prox / pi_behav, cap)``, detached."""
    return (proximal_logprobs - behavior_logprobs).detach().exp().clamp(max=cap)


class Mismatch(NamedTuple):
    """How far log-probabilities of one policy by two passes, or of two versions, are apart."""

    kl: float
    """Sum over the mask of the non-negative estimator of KL(behaviour || proximal)."""
    ratio: float
    """The largest factor between two probabilities of one token, 1 or more."""


def mismatch(proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Mismatch:
    """Between who sampled and who learns; all ``[B, R]``."""
    delta = (behavior_logprobs.double() - proximal_logprobs.double()).masked_fill(~mask, 0.0)
    return Mismatch(float(kl_k3(delta).sum()), float(delta.abs().max().exp()))


def kl_k1(log_ratio: Tensor) -> Tensor:
    """k1 = log p - log q for samples of p: unbiased, of either sign (Schulman 2020)."""
    return log_ratio


def kl_k3(log_ratio: Tensor) -> Tensor:
    """k3 = exp(-k1) - 1 + k1 with k1 = log p - log q for samples of p: never negative."""
    return torch.expm1(-log_ratio) + log_ratio
