"""Critic-free advantage estimators: each a function, none a trainer.

RLOO (Ahmadian 2024, arXiv 2402.14740), GRPO (Shao 2024, arXiv 2402.03300), REINFORCE++ (Hu 2025,
arXiv 2501.03262).

What is divided by a deviation is the score alone, and the KL penalty is added after: where all
scores are equal, their advantage is exactly 0 and the penalty keeps its own size. Normalised
together, the deviation would be the penalty's own, and its noise would be scaled up to 1.
Departures: GRPO's paper has the KL in the loss, REINFORCE++'s in what it normalises.
Shape suffixes: B sequences, R response positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.algorithms.gae import ROUNDING, masked_moments, whiten
from learner.algorithms.rewards import Rewards


def critic_free(
    algorithm: Literal["rloo", "grpo", "reinforce_pp"],
    rewards: Rewards,
    group_B: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float,
) -> Tensor:
    """Advantages ``[B, R]`` of scores and penalties together, by one of the estimators below."""
    scores_B, penalties_B = rewards.scores.sum(1), rewards.penalties.sum(1)
    if algorithm == "rloo":
        return rloo(scores_B + penalties_B, group_B, mask_BR)
    if algorithm == "grpo":
        kept = centred(penalties_B, group_B, mask_BR)
        return grpo(scores_B, group_B, mask_BR) + kept
    kept = centred_to_go(rewards.penalties, mask_BR, gamma=gamma)
    return reinforce_pp(rewards.scores, mask_BR, gamma=gamma) + kept


def rloo(rewards_B: Tensor, group_B: Tensor, mask_BR: Tensor) -> Tensor:
    """``A_i = r_i - mean of the other rewards of its prompt``, on every token, ``[B, R]``.

    Args:
        rewards_B: one number per sequence, KL included.
        group_B: int64, equal for responses of one prompt.

    Raises ValueError for a group of one.
    """
    rewards, inverse, count = _groups(rewards_B, group_B, "rloo")
    total = _sum(rewards, inverse, count)
    others = (total - rewards) / (count[inverse] - 1.0)
    return _spread(rewards - others, mask_BR, rewards_B)


def grpo(scores_B: Tensor, group_B: Tensor, mask_BR: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``A_i = (r_i - mean) / (std + eps)`` within the prompt's group, population std, ``[B, R]``.

    Add `centred` penalties. A group of scores that are equal but for their rounding has advantage
    exactly 0, whatever `eps`.

    Raises ValueError for a group of one.
    """
    scores, inverse, count = _groups(scores_B, group_B, "grpo")
    mean = _sum(scores, inverse, count) / count[inverse]
    deviation = (_sum((scores - mean).square(), inverse, count) / count[inverse]).sqrt()
    largest = torch.zeros_like(count).scatter_reduce(0, inverse, scores_B.double().abs(), "amax")
    differ = deviation > ROUNDING * largest[inverse]
    scaled = torch.where(differ, (scores - mean) / (deviation + eps), 0.0)
    return _spread(scaled, mask_BR, scores_B)


def centred(penalties_B: Tensor, group_B: Tensor, mask_BR: Tensor) -> Tensor:
    """Each sequence's penalty less the mean of its prompt's group, on every token, ``[B, R]``."""
    _, inverse, count = torch.unique(group_B, return_inverse=True, return_counts=True)
    penalties = penalties_B.double()
    mean = _sum(penalties, inverse, count.double()) / count[inverse]
    return _spread(penalties - mean, mask_BR, penalties_B)


def reinforce_pp(scores_BR: Tensor, mask_BR: Tensor, *, gamma: float) -> Tensor:
    """Discounted scores-to-go per token, whitened over the whole batch, ``[B, R]``.

    Add `centred_to_go` penalties.
    """
    return whiten(_to_go(scores_BR, mask_BR, gamma), mask_BR).to(scores_BR.dtype)


def centred_to_go(penalties_BR: Tensor, mask_BR: Tensor, *, gamma: float) -> Tensor:
    """Discounted penalties-to-go per token, less their mean over the whole batch, ``[B, R]``."""
    ahead = _to_go(penalties_BR, mask_BR, gamma)
    mean, _, _ = masked_moments(ahead, mask_BR)
    return (ahead - mean).masked_fill(~mask_BR, 0.0).to(penalties_BR.dtype)


def _to_go(rewards_BR: Tensor, mask_BR: Tensor, gamma: float) -> Tensor:
    """``sum_{u >= t} gamma^(u-t) r_u``; in float64, for a spread may be small beside the sums."""
    rewards = rewards_BR.double().masked_fill(~mask_BR, 0.0)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = rewards[:, t] + gamma * following
        returns[:, t] = following
    return returns


def _groups(rewards_B: Tensor, group_B: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards above the least of their group in float64, each row's group, the groups' sizes.

    Neither estimator feels a shift of its group; with this one, equal rewards are exactly 0 and
    their rounding can never be taken for a spread.
    """
    _, inverse, count = torch.unique(group_B, return_inverse=True, return_counts=True)
    if int(count.min()) < 2:
        raise ValueError(f"{name} needs at least two responses per prompt; a group has one")
    rewards = rewards_B.double()
    least = rewards.new_zeros(count.shape).scatter_reduce(
        0, inverse, rewards, "amin", include_self=False
    )
    return rewards - least[inverse], inverse, count.double()


def _sum(values: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
    """Each row's group total."""
    return torch.zeros_like(count).index_add(0, inverse, values)[inverse]


def _spread(advantages_B: Tensor, mask_BR: Tensor, like: Tensor) -> Tensor:
    return (advantages_B[:, None] * mask_BR).to(like.dtype)
