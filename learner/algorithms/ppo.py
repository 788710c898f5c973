"""Proximal policy optimisation (Schulman 2017, arXiv 1707.06347) and its decoupled form.

``L = -min(rho A, clip(rho, 1 - eps, 1 + eps) A)`` with ``rho = pi / pi_prox``. Where the samples'
log-probabilities are not pi_prox's, for they are older or were computed in another precision, each
term carries the truncated weight ``min(pi_prox / pi_behav, cap)`` (decoupled PPO: Hilton 2022,
arXiv 2110.00641). What later objectives put in the place of each part is in
`learner.algorithms.surrogates`.

Losses are *sums over the mask divided by `normalizer`*, the token count of the whole minibatch over
all ranks and micro-batches, so that adding up micro-batches gives the loss of the whole.
Shape suffixes: B sequences, R response positions, V vocabulary; tensors without one may have any
shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from learner.algorithms.gae import ROUNDING, masked_moments
from learner.algorithms.kl import kl_k3
from learner.algorithms.shapes import require_shape
from learner.algorithms.surrogates import (
    PPO,
    Surrogate,
    cispo,
    clipped,
    row_weights,
    sequence_log_ratio,
)


class PolicyLoss(NamedTuple):
    """The clipped objective of some rows, and what it measured on the way."""

    loss: Tensor
    """To differentiate."""
    clipped: Tensor
    """Tokens whose gradient the clip removed, detached."""
    k3: Tensor
    """Sum over the mask of the non-negative KL estimator of KL(proximal || now), detached."""


class ValueLoss(NamedTuple):
    """The value loss of some rows, and what it measured on the way."""

    loss: Tensor
    """To differentiate."""
    clipped: Tensor
    """Tokens whose gradient the clip removed, detached."""


def policy_loss(
    logprobs_BR: Tensor,
    proximal_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip_range: float,
    normalizer: float,
    importance_weights_BR: Tensor | None = None,
    surrogate: Surrogate = PPO,
) -> PolicyLoss:
    """Return the clipped objective.

    Args:
        logprobs_BR: log pi, of the policy as it is now.
        proximal_logprobs_BR: log pi_prox, as it was when the policy phase began.
        advantages_BR: A.
        mask_BR: bool, True = a response token, trained on.
        clip_range: eps.
        normalizer: response tokens of the whole minibatch; `surrogates.normalizer` of other
            aggregations.
        importance_weights_BR: as `surrogates.mismatch_weights` makes them; None: all 1.
        surrogate: what differs from PPO's.
    """
    require_shape(2, logprobs_BR, proximal_logprobs_BR, advantages_BR, mask_BR)
    # Padding may hold anything, so it is set to "no change" before exp can overflow, and to 0
    # wherever a gradient runs through it: that of a response's ratio is a sum over its tokens.
    hidden_BR = ~mask_BR
    delta_BR = (logprobs_BR - proximal_logprobs_BR).masked_fill(hidden_BR, 0.0)
    advantages_BR = advantages_BR.masked_fill(hidden_BR, 0.0)
    log_ratio_BR = delta_BR
    if surrogate.ratio == "sequence":
        log_ratio_BR = sequence_log_ratio(delta_BR, mask_BR)
    low, high = clip_range, surrogate.clip_high or clip_range
    if surrogate.clip == "weight":
        own_BR = logprobs_BR.masked_fill(hidden_BR, 0.0)
        gain_BR, removed_BR = cispo(log_ratio_BR.exp(), advantages_BR, own_BR, low=low, high=high)
    else:
        gain_BR, removed_BR = clipped(
            log_ratio_BR.exp(), advantages_BR, low=low, high=high, dual=surrogate.dual_clip
        )
    for weights in (importance_weights_BR, row_weights(mask_BR, surrogate.aggregation)):
        if weights is not None:
            gain_BR = gain_BR * weights.masked_fill(hidden_BR, 0.0)
    loss = -gain_BR.sum() / normalizer
    with torch.no_grad():
        k3 = (kl_k3(-delta_BR) * mask_BR).sum()
    return PolicyLoss(loss, (removed_BR & mask_BR).sum(), k3)


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    *,
    value_clip_range: float | None,
    normalizer: float,
) -> ValueLoss:
    """Return ``0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2)`` over the mask.

    Departure: Stiennon's code has a constant c, which fits scores of deviation 1; callers here take
    a share of `value_unit`. From returns near 50 values would be 250 iterations of c = 0.2 away.

    Args:
        values_BR: V.
        old_values_BR: V_old, as they were when the phase began.
        returns_BR: R, the value targets.
        mask_BR: bool, True = a response token, trained on.
        value_clip_range: c; None leaves the clip out.
        normalizer: response tokens of the whole minibatch.
    """
    require_shape(2, values_BR, old_values_BR, returns_BR, mask_BR)
    error_BR = (values_BR - returns_BR).square()
    clipped = torch.zeros((), dtype=torch.int64, device=values_BR.device)
    if value_clip_range is not None:
        moved_BR = (values_BR - old_values_BR).clamp(-value_clip_range, value_clip_range)
        near_error_BR = (old_values_BR + moved_BR - returns_BR).square()
        clipped = ((near_error_BR > error_BR) & mask_BR).sum()
        error_BR = torch.maximum(error_BR, near_error_BR)
    loss = 0.5 * error_BR.masked_fill(~mask_BR, 0.0).sum() / normalizer
    return ValueLoss(loss, clipped.detach())


def value_unit(old_values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """Return what values are measured in, so that no setting depends on the scores' scale or shift.

    It is the deviation of a whole batch's returns, or ``RMS(R - V_old)`` where that is more.

    Args:
        old_values_BR: V_old, as they were when the phase began.
        returns_BR: R, the value targets.
        mask_BR: bool, True = a response token.
    """
    require_shape(2, old_values_BR, returns_BR, mask_BR)
    missed_BR = (returns_BR.double() - old_values_BR.double()).masked_fill(~mask_BR, 0.0)
    return unit_of(float(missed_BR.square().sum()), returns_BR, mask_BR)


def unit_of(missed: float, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """Return the same as `value_unit`; 1 where all is equal but for its rounding.

    Args:
        missed: sum of the squares that values miss returns by.
        returns_BR: R, the value targets.
        mask_BR: bool, True = a response token.
    """
    _, variance, count = masked_moments(returns_BR, mask_BR)
    unit = math.sqrt(max(float(variance), missed / float(count)))
    largest = float(returns_BR.double().masked_fill(~mask_BR, 0.0).abs().max())
    return unit if unit > ROUNDING * largest else 1.0


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy ``[...]`` of the full distribution at temperature 1, in nats.

    Args:
        logits: ``[..., V]``.
    """
    logprobs = logits.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


class Mismatch(NamedTuple):
    """How far log-probabilities of one policy by two passes, or of two versions, are apart."""

    kl: float
    """Sum over the mask of the non-negative estimator of KL(behaviour || proximal)."""
    ratio: float
    """The largest factor between two probabilities of one token, 1 or more."""


def mismatch(
    proximal_logprobs_BR: Tensor, behavior_logprobs_BR: Tensor, mask_BR: Tensor
) -> Mismatch:
    """Measure how far the policy that sampled is from the one that learns.

    Args:
        proximal_logprobs_BR: by the learner, before its first step.
        behavior_logprobs_BR: of the samples as they were drawn.
        mask_BR: bool, True = a response token.
    """
    require_shape(2, proximal_logprobs_BR, behavior_logprobs_BR, mask_BR)
    delta_BR = behavior_logprobs_BR.double() - proximal_logprobs_BR.double()
    delta_BR = delta_BR.masked_fill(~mask_BR, 0.0)
    return Mismatch(float(kl_k3(delta_BR).sum()), float(delta_BR.abs().max().exp()))
