"""Critic-free advantages: what a response is worth beside others, without a value function.

RLOO (Ahmadian 2024, arXiv 2402.14740), GRPO (Shao 2024, arXiv 2402.03300), Dr. GRPO (Liu 2025,
arXiv 2503.20783), REINFORCE++ (Hu 2025, arXiv 2501.03262). `learner.algorithms.estimators` puts
scores and penalties together.
Shape suffixes: B sequences, G groups of sequences with one prompt, R response positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.algorithms.gae import ROUNDING, masked_moments, whiten
from learner.algorithms.shapes import require_shape


def rloo(rewards_B: Tensor, groups_B: Tensor, mask_BR: Tensor) -> Tensor:
    """Return ``A_i = r_i - mean of the other rewards of its prompt`` on every token, ``[B, R]``.

    Args:
        rewards_B: one number per sequence, KL included.
        groups_B: int64, equal for responses of one prompt.
        mask_BR: bool, True = a response token.

    Raises:
        ValueError: a group has one response.
    """
    above_B, inverse_B, count_G = _compared(rewards_B, groups_B, "rloo")
    total_B = _group_sums(above_B, inverse_B, count_G)
    others_B = (total_B - above_B) / (count_G[inverse_B] - 1.0)
    return _on_tokens(above_B - others_B, mask_BR, rewards_B)


def grpo(scores_B: Tensor, groups_B: Tensor, mask_BR: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return ``A_i = (r_i - mean) / (std + eps)`` within the prompt's group, ``[B, R]``.

    The deviation is the population's. A group of scores that are equal but for their rounding has
    advantage exactly 0, whatever `eps`.

    Args:
        scores_B: one number per sequence; the penalties are to be added `centred`.
        groups_B: int64, equal for responses of one prompt.
        mask_BR: bool, True = a response token.
        eps: keeps the quotient of a small deviation finite.

    Raises:
        ValueError: a group has one response.
    """
    above_B, inverse_B, count_G = _compared(scores_B, groups_B, "grpo")
    apart_B = above_B - _group_sums(above_B, inverse_B, count_G) / count_G[inverse_B]
    variance_B = _group_sums(apart_B.square(), inverse_B, count_G) / count_G[inverse_B]
    deviation_B = variance_B.sqrt()
    largest_G = torch.zeros_like(count_G).scatter_reduce(
        0, inverse_B, scores_B.double().abs(), "amax"
    )
    differ_B = deviation_B > ROUNDING * largest_G[inverse_B]
    scaled_B = torch.where(differ_B, apart_B / (deviation_B + eps), 0.0)
    return _on_tokens(scaled_B, mask_BR, scores_B)


def centred(penalties_B: Tensor, groups_B: Tensor, mask_BR: Tensor) -> Tensor:
    """Return each number less the mean of its prompt's group, on every token, ``[B, R]``.

    Of rewards this is the advantage of Dr. GRPO; of penalties, what is added to that of GRPO.

    Args:
        penalties_B: one number per sequence.
        groups_B: int64, equal for responses of one prompt.
        mask_BR: bool, True = a response token.
    """
    _, inverse_B, count_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    wide_B = penalties_B.double()
    mean_B = _group_sums(wide_B, inverse_B, count_G.double()) / count_G[inverse_B]
    return _on_tokens(wide_B - mean_B, mask_BR, penalties_B)


def reinforce_pp(scores_BR: Tensor, mask_BR: Tensor, *, gamma: float) -> Tensor:
    """Return discounted scores-to-go per token, whitened over the whole batch, ``[B, R]``.

    Args:
        scores_BR: scores by token; the penalties are to be added `centred_to_go`.
        mask_BR: bool, True = a response token.
        gamma: discount from token to token.
    """
    return whiten(_to_go(scores_BR, mask_BR, gamma), mask_BR).to(scores_BR.dtype)


def centred_to_go(penalties_BR: Tensor, mask_BR: Tensor, *, gamma: float) -> Tensor:
    """Return discounted penalties-to-go less their mean over the whole batch, ``[B, R]``.

    Args:
        penalties_BR: penalties by token.
        mask_BR: bool, True = a response token.
        gamma: discount from token to token.
    """
    ahead_BR = _to_go(penalties_BR, mask_BR, gamma)
    mean, _, _ = masked_moments(ahead_BR, mask_BR)
    return (ahead_BR - mean).masked_fill(~mask_BR, 0.0).to(penalties_BR.dtype)


def _to_go(rewards_BR: Tensor, mask_BR: Tensor, gamma: float) -> Tensor:
    """``sum_{u >= t} gamma^(u-t) r_u``; in float64, for a spread may be small beside the sums."""
    require_shape(2, rewards_BR, mask_BR)
    rewards_BR = rewards_BR.double().masked_fill(~mask_BR, 0.0)
    returns_BR = torch.zeros_like(rewards_BR)
    following_B = torch.zeros_like(rewards_BR[:, 0])
    for t in range(rewards_BR.shape[1] - 1, -1, -1):
        following_B = rewards_BR[:, t] + gamma * following_B
        returns_BR[:, t] = following_B
    return returns_BR


def _compared(rewards_B: Tensor, groups_B: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards above the least of their group in float64, each row's group, the groups' sizes.

    Neither estimator feels a shift of its group; with this one, equal rewards are exactly 0 and
    their rounding can never be taken for a spread.
    """
    require_shape(1, rewards_B, groups_B)
    _, inverse_B, count_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    if int(count_G.min()) < 2:
        raise ValueError(f"{name} needs at least two responses per prompt; a group has one")
    rewards_B = rewards_B.double()
    least_G = rewards_B.new_zeros(count_G.shape).scatter_reduce(
        0, inverse_B, rewards_B, "amin", include_self=False
    )
    return rewards_B - least_G[inverse_B], inverse_B, count_G.double()


def _group_sums(values_B: Tensor, inverse_B: Tensor, count_G: Tensor) -> Tensor:
    """Each row's group total ``[B]``."""
    return torch.zeros_like(count_G).index_add(0, inverse_B, values_B)[inverse_B]


def _on_tokens(advantages_B: Tensor, mask_BR: Tensor, like: Tensor) -> Tensor:
    """Put a sequence's advantage on each of its tokens, ``[B, R]``."""
    return (advantages_B[:, None] * mask_BR).to(like.dtype)
