"""Phasic policy gradient (Cobbe 2020, arXiv 2009.04416): the auxiliary phase's losses.

``L_joint = 0.5 (V_aux - V_targ)^2 / u^2 + beta_clone KL(pi_old || pi)``, the KL over the full
distribution: all of the vocabulary, no filter, temperature 1. Departure: the unit u, for the paper
normalises rewards, and beta_clone would weigh otherwise for every scale of scores. Sums over the
mask divided by `normalizer`, as in `learner.algorithms.ppo`.
Shape suffixes: B sequences, R response positions. Logits ``[..., V]`` may have any leading axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from common.models.precision import wide
from learner.algorithms.shapes import require_shape


class JointLoss(NamedTuple):
    """The loss of the auxiliary phase and its parts."""

    total: Tensor
    """To differentiate."""
    aux_value: Tensor
    """The value term by itself, before units, detached."""
    clone_kl: Tensor
    """KL(pi_old || pi), before its weight, detached."""


class Normalizer(NamedTuple):
    """What makes probabilities of logits: ``exp(logits - peak) / total``."""

    peak: Tensor
    """``[...]``: the largest logit, without a gradient."""
    total: Tensor
    """``[...]``: sum of ``exp(logits - peak)`` over the vocabulary."""

    @classmethod
    def none(cls) -> Normalizer:
        """Return that of no logits."""
        return cls(torch.tensor(-torch.inf), torch.zeros(()))

    def with_more(self, logits: Tensor) -> tuple[Tensor, Tensor, Normalizer]:
        """Add some of the vocabulary, ``[..., v]``.

        Returns:
            by what sums over the earlier ones shrink, the new ones' ``exp(logits - peak)``, and the
            normalizer of all.
        """
        peak = logits.detach().amax(-1).maximum(self.peak)
        kept = (self.peak - peak).exp()
        weights = (logits - peak[..., None]).exp()
        total = self.total * kept + weights.sum(-1)
        return kept, weights, Normalizer(peak, total)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return those of some of the vocabulary: ``[..., v]`` of logits ``[..., v]``."""
        return (wide(logits) - self.peak[..., None]).exp() / self.total[..., None]


class CloneKl(NamedTuple):
    """KL(pi_old || pi) at each position, and what its gradient is made of."""

    kl: Tensor
    """``[...]``."""
    old: Normalizer
    new: Normalizer


def clone_kl(stretches: Iterable[tuple[Tensor, Tensor]]) -> CloneKl:
    """Return KL(pi_old || pi) at each position ``[...]``; exactly 0 for identical logits.

    ``KL = sum_v p_old(v) (z_old(v) - z(v)) + log Z - log Z_old``: sums over the vocabulary, of
    which a stretch at a time is looked at. Its gradient is ``d KL / d z(v) = p(v) - p_old(v)``, of
    which both are in what is returned (`Normalizer.probabilities`).

    Args:
        stretches: all of the vocabulary: logits ``[..., v]`` of pi_old and of pi for each part.
    """
    old_n, new_n, apart = Normalizer.none(), Normalizer.none(), torch.zeros(())
    for old_logits, logits in stretches:
        require_shape(old_logits.dim(), old_logits, logits)
        old, new = wide(old_logits), wide(logits)
        kept, weights, old_n = old_n.with_more(old)
        *_, new_n = new_n.with_more(new)
        apart = apart * kept + (weights * (old - new)).sum(-1)
    # The logarithm of a ratio near 1, not the difference of two logarithms, which round apart.
    between = (new_n.peak - old_n.peak) + (new_n.total / old_n.total).log()
    return CloneKl(apart / old_n.total + between, old_n, new_n)


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
