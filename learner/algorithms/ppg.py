"""Phasic policy gradient (Cobbe 2020, arXiv 2009.04416): the auxiliary phase's losses.

``L_joint = 0.5 (V_aux - V_targ)^2 / u^2 + beta_clone KL(pi_old || pi)``, the KL over the full
distribution: all of the vocabulary, no filter, temperature 1. Departure: the unit u, for the paper
normalises rewards, and beta_clone would weigh otherwise for every scale of scores. Sums over the
mask divided by `normalizer`, as in `learner.algorithms.ppo`.
Shape suffixes: B sequences, R response positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class JointLoss(NamedTuple):
    """`total` to differentiate; its two parts detached."""

    total: Tensor
    aux_value: Tensor
    clone_kl: Tensor


def clone_kl(
    old_logits_BRV: Tensor, logits_BRV: Tensor, mask_BR: Tensor, *, normalizer: float
) -> Tensor:
    """KL(pi_old || pi) over the full distribution; exactly 0 for identical logits."""
    old = old_logits_BRV.float().log_softmax(dim=-1)
    new = logits_BRV.float().log_softmax(dim=-1)
    kl_BR = (old.exp() * (old - new)).sum(dim=-1)
    return kl_BR.masked_fill(~mask_BR, 0.0).sum() / normalizer


def auxiliary_value_loss(
    v_aux: Tensor, v_targ: Tensor, mask: Tensor, *, normalizer: float
) -> Tensor:
    """``0.5 (V - V_targ)^2`` over the mask; all ``[B, R]``."""
    return 0.5 * (v_aux - v_targ).square().masked_fill(~mask, 0.0).sum() / normalizer


def joint_loss(
    v_aux: Tensor,
    v_targ: Tensor,
    old_logits: Tensor,
    logits: Tensor,
    mask: Tensor,
    *,
    beta_clone: float,
    normalizer: float,
    value_unit: float = 1.0,
) -> JointLoss:
    """The policy network's loss in the auxiliary phase; `value_unit` is u."""
    value = auxiliary_value_loss(v_aux, v_targ, mask, normalizer=normalizer)
    kl = clone_kl(old_logits, logits, mask, normalizer=normalizer)
    return JointLoss(value / value_unit**2 + beta_clone * kl, value.detach(), kl.detach())
