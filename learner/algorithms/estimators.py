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
from functools import partial
from typing import NamedTuple

from torch import Tensor

from learner.algorithms import advantages
from learner.algorithms.gae import gae, length_lambda, whiten
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
    value_lambda: float | None = None
    """lambda of the value function's targets; None is the advantages' own."""
    length_alpha: float | None = None
    """alpha of a lambda that follows the length of a response; None: all have `gae_lambda`."""


class Estimate(NamedTuple):
    """What an estimator makes of the outcomes, zero outside the mask."""

    advantages_BR: Tensor
    """float64, how much better than expected each token was."""
    returns_BR: Tensor | None = None
    """float64 targets of the value function; None of an algorithm that has none."""


Estimator = Callable[[Outcomes], Estimate]


def ppo(outcomes: Outcomes) -> Estimate:
    """GAE over rewards and values, whitened over the batch."""
    estimate = partial(
        gae,
        outcomes.rewards.total_BR,
        outcomes.values_BR.double(),
        outcomes.mask_BR,
        gamma=outcomes.gamma,
    )
    own: float | Tensor = outcomes.gae_lambda
    if outcomes.length_alpha is not None:
        own = length_lambda(outcomes.mask_BR, alpha=outcomes.length_alpha)
    advantages_BR, returns_BR = estimate(gae_lambda=own)
    if outcomes.value_lambda is not None:
        _, returns_BR = estimate(gae_lambda=outcomes.value_lambda)
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


def dr_grpo(outcomes: Outcomes) -> Estimate:
    """Rewards less the mean of their prompt's group: no deviation makes easy prompts loud."""
    scores_B, penalties_B = outcomes.rewards.per_sequence()
    return Estimate(advantages.centred(scores_B + penalties_B, outcomes.groups_B, outcomes.mask_BR))


def reinforce_pp_baseline(outcomes: Outcomes) -> Estimate:
    """Scores less their group's mean, whitened over the batch, and penalties-to-go as before."""
    rewards, groups_B, mask_BR = outcomes.rewards, outcomes.groups_B, outcomes.mask_BR
    scores_B, _ = rewards.per_sequence()
    apart_BR = advantages.centred(scores_B, groups_B, mask_BR)
    penalties_BR = advantages.centred_to_go(rewards.penalties_BR, mask_BR, gamma=outcomes.gamma)
    return Estimate(whiten(apart_BR, mask_BR) + penalties_BR)


def reinforce_pp(outcomes: Outcomes) -> Estimate:
    """Discounted scores-to-go whitened over the batch, and penalties-to-go centred in it."""
    rewards, mask_BR, gamma = outcomes.rewards, outcomes.mask_BR, outcomes.gamma
    penalties_BR = advantages.centred_to_go(rewards.penalties_BR, mask_BR, gamma=gamma)
    return Estimate(advantages.reinforce_pp(rewards.scores_BR, mask_BR, gamma=gamma) + penalties_BR)


ESTIMATORS: dict[str, Estimator] = {
    "ppo": ppo,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
"""By the names of `common.config.algorithms.ALGORITHMS`."""
