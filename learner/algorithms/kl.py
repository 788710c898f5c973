"""Estimators of a KL divergence from samples (Schulman 2020, "Approximating KL divergence").

Shape suffixes: B sequences, R response positions; tensors without one may have any shape.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.algorithms.shapes import require_shape

KlEstimator = Literal["k2", "k3", "unbiased"]


def kl_k1(log_ratio: Tensor) -> Tensor:
    """Return k1: unbiased, of either sign (Schulman 2020).

    Args:
        log_ratio: log p - log q for samples of p, of any shape.
    """
    return log_ratio


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Return k3 = exp(-k1) - 1 + k1: unbiased, never negative.

    Args:
        log_ratio: k1 = log p - log q for samples of p, of any shape.
    """
    return torch.expm1(-log_ratio) + log_ratio


def kl_terms(
    log_ratio_BR: Tensor, logprobs_BR: Tensor, ref_logprobs_BR: Tensor, estimator: KlEstimator
) -> Tensor:
    """Return terms of a KL to the reference that stands in the loss, ``[B, R]``.

    With ``d = log pi - log pi_ref`` and w the ratio ``pi / pi_prox``, constant but in the last:

    - ``k2``: ``w d^2 / 2``, whose gradient is that of KL(pi || pi_ref);
    - ``k3``: ``w (exp(-d) - 1 + d)``, GRPO's, whose gradient is that of KL(pi_ref || pi);
    - ``unbiased``: ``w d`` with the gradient of w in it: value and gradient of KL(pi || pi_ref).

    There is no k1: the expectation of its gradient is 0 (Schulman 2020; derived by enumeration in
    the tests).

    Args:
        log_ratio_BR: log pi - log pi_prox, 0 outside the mask.
        logprobs_BR: log pi of the whole distribution, set to the reference's outside the mask.
        ref_logprobs_BR: log pi_ref of the whole distribution, likewise.
        estimator: which.
    """
    require_shape(2, log_ratio_BR, logprobs_BR, ref_logprobs_BR)
    ratio_BR = log_ratio_BR.exp()
    distance_BR = logprobs_BR - ref_logprobs_BR
    match estimator:
        case "k2":
            return ratio_BR.detach() * 0.5 * distance_BR.square()
        case "k3":
            return ratio_BR.detach() * kl_k3(distance_BR)
        case "unbiased":
            return ratio_BR * kl_k1(distance_BR)
