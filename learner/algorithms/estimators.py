"""Advantage estimators by the name of their algorithm: a function each, none a trainer.

To add one: a function here (its maths in `learner.algorithms.advantages`, or in a file of its own),
and a row of what it needs in `common.config.algorithms`.

Departure: what is divided by a deviation is the score alone, and the KL penalty is added after.
Where all scores are equal, their advantage is exactly 0 and the penalty keeps its own size.
Normalised together, the deviation would be the penalty's own, and its noise would be scaled up
to 1. GRPO's paper has the KL in the loss, REINFORCE++'s in what it normalises.
Shape suffixes: B sequences, R response positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from learner.algorithms import advantages
from learner.algorithms.gae import gae, whiten
from learner.algorithms.rewards import Rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What became of a batch of responses: all that an estimator may look at."""

    rewards: Rewards
    """float64 scores and KL penalties."""
    values_BR: Tensor
    """float32 values of the states that tokens were sampled in; zeros without a value function."""
    groups_B: Tensor
    """int64, equal for responses of one prompt."""
    mask_BR: Tensor
    """bool, True = a response token."""
    gamma: float
    """Discount from token to token."""
    gae_lambda: float
    """lambda of GAE."""


class Estimate(NamedTuple):
    """What an estimator makes of the outcomes, zero outside the mask."""

    advantages_BR: Tensor
    """float64, how much better than expected each token was."""
    returns_BR: Tensor | None = None
    """float64 targets of the value function; None of an algorithm that has none."""


Estimator = Callable[[Outcomes], Estimate]


def ppo(outcomes: Outcomes) -> Estimate:
    """GAE over rewards and values, whitened over the batch."""
    advantages_BR, returns_BR = gae(
        outcomes.rewards.total_BR,
        outcomes.values_BR.double(),
        outcomes.mask_BR,
        gamma=outcomes.gamma,
        gae_lambda=outcomes.gae_lambda,
    )
    return Estimate(whiten(advantages_BR, outcomes.mask_BR), returns_BR)


def rloo(outcomes: Outcomes) -> Estimate:
    """Leave-one-out: the reward less the mean of the others of its prompt."""
    scores_B, penalties_B = outcomes.rewards.per_sequence()
    return Estimate(advantages.rloo(scores_B + penalties_B, outcomes.groups_B, outcomes.mask_BR))


def grpo(outcomes: Outcomes) -> Estimate:
    """Scores normalised within their prompt's group, and penalties centred in it."""
    groups_B, mask_BR = outcomes.groups_B, outcomes.mask_BR
    scores_B, penalties_B = outcomes.rewards.per_sequence()
    penalties_BR = advantages.centred(penalties_B, groups_B, mask_BR)
    return Estimate(advantages.grpo(scores_B, groups_B, mask_BR) + penalties_BR)


def reinforce_pp(outcomes: Outcomes) -> Estimate:
    """Discounted scores-to-go whitened over the batch, and penalties-to-go centred in it."""
    rewards, mask_BR, gamma = outcomes.rewards, outcomes.mask_BR, outcomes.gamma
    penalties_BR = advantages.centred_to_go(rewards.penalties_BR, mask_BR, gamma=gamma)
    return Estimate(advantages.reinforce_pp(rewards.scores_BR, mask_BR, gamma=gamma) + penalties_BR)


ESTIMATORS: dict[str, Estimator] = {
    "ppo": ppo,
    "rloo": rloo,
    "grpo": grpo,
    "reinforce_pp": reinforce_pp,
}
"""By the names of `common.config.algorithms.ALGORITHMS`."""
