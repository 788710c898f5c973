"""Formulas refuse what would broadcast."""

from __future__ import annotations

import pytest
import torch

from learner.algorithms.gae import gae, masked_moments
from learner.algorithms.ppo import policy_loss, value_unit
from learner.algorithms.rewards import reward_parts
from learner.algorithms.shapes import require_shape

GRID, COLUMN, ROW = torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(3)
MASK = torch.ones(2, 3, dtype=torch.bool)


def test_one_shape_of_one_rank_is_asked_for() -> None:
    require_shape(2, GRID, MASK)
    for rank, tensors in ((1, [GRID]), (2, [GRID, COLUMN]), (2, [GRID, ROW])):
        with pytest.raises(ValueError, match=f"one shape of rank {rank}"):
            require_shape(rank, *tensors)


@pytest.mark.parametrize("wrong", [COLUMN, ROW, GRID[:1]])
def test_every_formula_asks(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one shape"):
        gae(GRID, wrong, MASK, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(GRID, wrong, GRID, MASK, clip_range=0.2, normalizer=1.0)
    with pytest.raises(ValueError, match="one shape"):
        value_unit(wrong, GRID, MASK)
    with pytest.raises(ValueError, match="one shape"):
        masked_moments(wrong, MASK)
    with pytest.raises(ValueError, match="one shape"):
        reward_parts(torch.zeros(1), GRID, GRID, MASK, kl_coef=0.1)
