"""Phasic policy gradient (Cobbe 2020, arXiv 2009.04416): the auxiliary phase's losses.

``L_joint = 0.5 (V_aux - V_targ)^2 / u^2 + beta_clone KL(pi_old || pi)``, the KL over the full
distribution: all of the vocabulary, no filter, temperature 1. Departure: the unit u, for the paper
normalises rewards, and beta_clone would weigh otherwise for every scale of scores. Sums over the
mask divided by `normalizer`, as in `learner.algorithms.ppo`.
Shape suffixes: B sequences, R response positions. Logits ``[..., V]`` may have any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from learner.algorithms.shapes import require_shape


class JointLoss(NamedTuple):
    """The loss of the auxiliary phase and its parts."""

    total: Tensor
    """To differentiate."""
    aux_value: Tensor
    """The value term by itself, before units, detached."""
    clone_kl: Tensor
    """KL(pi_old || pi), before its weight, detached."""


def clone_kl(old_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(pi_old || pi) at each position ``[...]``; exactly 0 for identical logits.

    Args:
        old_logits: ``[..., V]`` of pi_old.
        logits: ``[..., V]`` of pi, at the same positions.
    """
    require_shape(old_logits.dim(), old_logits, logits)
    old = old_logits.float().log_softmax(dim=-1)
    new = logits.float().log_softmax(dim=-1)
    return (old.exp() * (old - new)).sum(dim=-1)


def auxiliary_value_loss(
    v_aux_BR: Tensor, v_targ_BR: Tensor, mask_BR: Tensor, *, normalizer: float
) -> Tensor:
    """Return ``0.5 (V_aux - V_targ)^2`` over the mask.

    Args:
        v_aux_BR: values by the policy's auxiliary head.
        v_targ_BR: value targets of the policy phase.
        mask_BR: bool, True = a response token.
        normalizer: response tokens of the whole minibatch.
    """
    require_shape(2, v_aux_BR, v_targ_BR, mask_BR)
    return 0.5 * (v_aux_BR - v_targ_BR).square().masked_fill(~mask_BR, 0.0).sum() / normalizer


def joint_loss(
    v_aux_BR: Tensor,
    v_targ_BR: Tensor,
    kl_BR: Tensor,
    mask_BR: Tensor,
    *,
    beta_clone: float,
    normalizer: float,
    value_unit: float = 1.0,
) -> JointLoss:
    """Return the policy network's loss in the auxiliary phase.

    Args:
        v_aux_BR: values by the policy's auxiliary head.
        v_targ_BR: value targets of the policy phase.
        kl_BR: `clone_kl` from a frozen copy of the policy as the phase began.
        mask_BR: bool, True = a response token.
        beta_clone: weight of the KL.
        normalizer: response tokens of the whole minibatch.
        value_unit: u, what values are measured in.
    """
    value = auxiliary_value_loss(v_aux_BR, v_targ_BR, mask_BR, normalizer=normalizer)
    require_shape(2, kl_BR, mask_BR)
    kl = kl_BR.masked_fill(~mask_BR, 0.0).sum() / normalizer
    return JointLoss(value / value_unit**2 + beta_clone * kl, value.detach(), kl.detach())
