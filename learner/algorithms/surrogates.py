"""What stands for the policy's improvement in a loss: ratios, clips, and how terms are added up.

The clipped objective of PPO is `learner.algorithms.ppo.policy_loss`; these are the parts in which
later ones differ from it. Each function names its paper.

Shape suffixes: B sequences, R response positions. Everything outside the mask is finite and counts
for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learner.algorithms.shapes import require_shape

Aggregation = Literal["tokens", "sequences", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """What differs from PPO's."""

    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: the ratio of each token, or one of each sequence (GSPO)."""
    clip: Literal["objective", "weight"] = "objective"
    """What the clip holds: the objective, or the weight of the gradient (CISPO)."""
    clip_high: float | None = None
    """How far above 1 a ratio may rise; None is as far as it may fall."""
    dual_clip: float | None = None
    """c of the dual clip; None leaves it out."""
    aggregation: Aggregation = "tokens"
    """How terms are added up (`row_weights`)."""


PPO = Surrogate()


def sequence_log_ratio(log_ratio_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Return ``log s_i = mean over tokens of log rho_it`` on every token, ``[B, R]``.

    GSPO (Zheng 2025, arXiv 2507.18071, equation 7): one ratio a sequence, of the length that
    probabilities of single tokens have. At one token it is the token's own.

    Args:
        log_ratio_BR: log pi - log pi_prox by token, 0 outside the mask.
        mask_BR: bool, True = a response token.
    """
    require_shape(2, log_ratio_BR, mask_BR)
    lengths_B1 = mask_BR.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1 = log_ratio_BR.sum(dim=1, keepdim=True) / lengths_B1
    return mean_B1.expand_as(log_ratio_BR) * mask_BR


def clipped(
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``min(rho A, clip(rho, 1 - low, 1 + high) A)``, and where its gradient is removed.

    With ``low = high`` this is PPO's (Schulman 2017, equation 7); a higher `high` leaves improbable
    tokens room to grow (clip-higher: DAPO, Yu 2025, arXiv 2503.14476, equation 10). With `dual` it
    is at least ``dual A`` where A is negative, so that a token that became far more probable does
    not get a loss without bound (Ye 2020, arXiv 1912.09729, equation 5).

    Args:
        ratio: rho, of any shape.
        advantages: A, of the same shape.
        low: how far below 1 a ratio may fall.
        high: how far above 1 it may rise.
        dual: c, above 1; None leaves the bound out.
    """
    free = ratio * advantages
    held = ratio.clamp(1.0 - low, 1.0 + high) * advantages
    objective = torch.minimum(free, held)
    removed = held < free
    if dual is not None:
        bound = dual * advantages
        below = (advantages < 0) & (objective < bound)
        objective, removed = torch.where(below, bound, objective), removed | below
    return objective, removed


def cispo(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return ``stopgrad(clip(rho, 1 - low, 1 + high)) A log pi``, and where the weight is clipped.

    CISPO (MiniMax 2025, arXiv 2506.13585, equations 4 and 5): what is clipped is the weight, so no
    token loses its gradient.

    Args:
        ratio: rho, of any shape.
        advantages: A, of the same shape.
        logprobs: log pi, of the same shape.
        low: how far below 1 a weight may fall.
        high: how far above 1 it may rise.
    """
    weight = ratio.detach().clamp(1.0 - low, 1.0 + high)
    return weight * advantages * logprobs, weight != ratio.detach()


def row_weights(mask_BR: Tensor, aggregation: Aggregation) -> Tensor | None:
    """Return what the terms of each sequence are multiplied by, ``[B, 1]``; None is 1.

    - ``tokens``: every token counts alike, wherever it stands (DAPO, equation 8);
    - ``sequences``: every sequence counts alike, by the mean of its tokens (GRPO, Shao 2024,
      arXiv 2402.03300, equation 3);
    - ``constant``: tokens are added up and divided by a length that all sequences share, so that
      neither their number nor that of others matters (Dr. GRPO, Liu 2025, arXiv 2503.20783).

    Args:
        mask_BR: bool, True = a response token.
        aggregation: how terms are added up; `normalizer` is the other half of it.
    """
    if aggregation != "sequences":
        return None
    return 1.0 / mask_BR.sum(dim=1, keepdim=True).clamp(min=1)


def normalizer(aggregation: Aggregation, *, tokens: float, sequences: float, longest: int) -> float:
    """Return what a minibatch's weighted terms are divided by.

    Args:
        aggregation: how terms are added up.
        tokens: response tokens of the whole minibatch.
        sequences: its sequences.
        longest: the most tokens that a response can have.
    """
    match aggregation:
        case "tokens":
            return tokens
        case "sequences":
            return sequences
        case "constant":
            return sequences * longest


def mismatch_weights(
    log_weights_BR: Tensor,
    mask_BR: Tensor,
    *,
    level: Literal["token", "sequence"],
    outside: Literal["truncate", "mask"],
    cap: float,
) -> Tensor:
    """Return weights of samples that another policy drew, ``[B, R]``, detached.

    Truncated importance sampling by token (Hilton 2022, arXiv 2110.00641: ``min(w, cap)``), or by
    sequence: the product of its tokens' weights on each of them. ``mask`` leaves out, with weight
    0, what is above the cap or below ``1 / cap``.

    Args:
        log_weights_BR: log pi_prox - log pi_behav by token.
        mask_BR: bool, True = a response token.
        level: whose probabilities are compared.
        outside: what becomes of weights beyond the bounds.
        cap: the largest weight, 1 or more.
    """
    require_shape(2, log_weights_BR, mask_BR)
    log_BR = log_weights_BR.detach().double().masked_fill(~mask_BR, 0.0)
    if level == "sequence":
        log_BR = log_BR.sum(dim=1, keepdim=True).expand_as(log_BR)
    weights_BR = log_BR.exp()
    if outside == "truncate":
        weights_BR = weights_BR.clamp(max=cap)
    else:
        inside_BR = (weights_BR <= cap) & (weights_BR >= 1.0 / cap)
        weights_BR = torch.where(inside_BR, weights_BR, 0.0)
    return weights_BR.to(log_weights_BR.dtype)
