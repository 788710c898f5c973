"""Critic-free advantage estimators: each a function, none a trainer.

RLOO (Ahmadian 2024, arXiv 2402.14740), GRPO (Shao 2024, arXiv 2402.03300), REINFORCE++ (Hu 2025,
arXiv 2501.03262). Departure: KL enters through the reward in all three (GRPO's paper adds it to
the loss). Shape suffixes: B sequences, R response positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.gae import whiten


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


def grpo(rewards_B: Tensor, group_B: Tensor, mask_BR: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``A_i = (r_i - mean) / (std + eps)`` within the prompt's group, population std, ``[B, R]``.

    A group of equal rewards has advantage exactly 0, whatever `eps`.

    Raises ValueError for a group of one.
    """
    rewards, inverse, count = _groups(rewards_B, group_B, "grpo")
    centred = rewards - _sum(rewards, inverse, count) / count[inverse]
    deviation = (_sum(centred.square(), inverse, count) / count[inverse]).sqrt()
    scaled = torch.where(deviation > 0, centred / (deviation + eps), 0.0)
    return _spread(scaled, mask_BR, rewards_B)


def reinforce_pp(rewards_BR: Tensor, mask_BR: Tensor, *, gamma: float) -> Tensor:
    """Discounted rewards-to-go per token, whitened over the whole batch, ``[B, R]``."""
    # In float64: whitening divides by a spread that may be small beside the returns' rounding.
    rewards = rewards_BR.double().masked_fill(~mask_BR, 0.0)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = rewards[:, t] + gamma * following
        returns[:, t] = following
    return whiten(returns, mask_BR).to(rewards_BR.dtype)


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
