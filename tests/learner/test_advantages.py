"""Critic-free estimators against the slow reference, and what each must not depend on."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.advantages import grpo, reinforce_pp, rloo
from tests import reference
from tests.learner.ragged import EXAMPLES, Ragged, raggeds, same, widen


@st.composite
def grouped(draw: st.DrawFn, dtype: torch.dtype | None = None) -> tuple[Ragged, Tensor, Tensor]:
    """A batch, its rewards ``[B]`` and its groups ``[B]``: any ids, any order, two rows or more."""
    sizes = draw(st.dictionaries(st.integers(-9, 2**40), st.integers(2, 4), min_size=1, max_size=3))
    groups = draw(st.permutations([group for group, size in sizes.items() for _ in range(size)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    lengths = torch.randint(1, 6, (len(groups), 1), generator=generator)
    batch = Ragged(
        mask_BR=torch.arange(6)[None] < lengths,
        generator=generator,
        dtype=dtype or draw(st.sampled_from([torch.float64, torch.float32])),
    )
    return batch, batch.per_row(), torch.tensor(groups)


@EXAMPLES
@given(case=grouped())
def test_rloo_is_the_references(case: tuple[Ragged, Tensor, Tensor]) -> None:
    batch, rewards, groups = case
    found = rloo(rewards, groups, batch.mask_BR)
    lists = [x.tolist() for x in (rewards, groups, batch.mask_BR)]
    same(found, reference.rloo(*lists), batch.dtype)


@EXAMPLES
@given(case=grouped(), eps=st.sampled_from([1e-8, 1e-4, 0.1]))
def test_grpo_is_the_references(case: tuple[Ragged, Tensor, Tensor], eps: float) -> None:
    batch, rewards, groups = case
    found = grpo(rewards, groups, batch.mask_BR, eps=eps)
    lists = [x.tolist() for x in (rewards, groups, batch.mask_BR)]
    same(found, reference.grpo(*lists, eps=eps), batch.dtype)


@EXAMPLES
@given(batch=raggeds(), gamma=st.floats(0.0, 1.0))
def test_reinforce_pp_is_the_references(batch: Ragged, gamma: float) -> None:
    rewards, mask = batch.numbers(), batch.mask_BR
    found = reinforce_pp(rewards, mask, gamma=gamma)
    expected = reference.reinforce_pp(rewards.tolist(), mask.tolist(), gamma, 1e-8)
    same(found, expected, batch.dtype)
    assert not found[~mask].any()


@EXAMPLES
@given(case=grouped(dtype=torch.float64), seed=st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(case: tuple[Ragged, Tensor, Tensor], seed: int) -> None:
    batch, rewards, groups = case
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    for estimate in (rloo, grpo):
        straight = estimate(rewards, groups, batch.mask_BR)
        shuffled = estimate(rewards[order], groups[order], batch.mask_BR[order])
        torch.testing.assert_close(shuffled, straight[order], atol=1e-6, rtol=0)
    tokens = batch.numbers()
    straight = reinforce_pp(tokens, batch.mask_BR, gamma=0.9)
    shuffled = reinforce_pp(tokens[order], batch.mask_BR[order], gamma=0.9)
    torch.testing.assert_close(shuffled, straight[order], atol=1e-6, rtol=0)


@EXAMPLES
@given(case=grouped(), columns=st.integers(1, 3))
def test_padding_columns_change_nothing(case: tuple[Ragged, Tensor, Tensor], columns: int) -> None:
    batch, rewards, groups = case
    mask, wide = batch.mask_BR, widen(batch.mask_BR, columns)
    tokens = batch.numbers()
    for narrow, padded in (
        (rloo(rewards, groups, mask), rloo(rewards, groups, wide)),
        (grpo(rewards, groups, mask), grpo(rewards, groups, wide)),
        (
            reinforce_pp(tokens, mask, gamma=1.0),
            reinforce_pp(widen(tokens, columns), wide, gamma=1.0),
        ),
    ):
        same(padded[:, : mask.shape[1]], narrow.tolist(), batch.dtype)
        assert not padded[~wide].any()


def test_rloo_of_two_is_their_difference_and_groups_do_not_mix() -> None:
    rewards, groups = torch.tensor([1.0, 50.0, 4.0, 70.0]), torch.tensor([7, 3, 7, 3])
    mask = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    found = rloo(rewards, groups, mask)
    assert found.tolist() == [[-3.0, -3.0], [-20.0, 0.0], [3.0, 0.0], [20.0, 20.0]]


def test_grpo_divides_by_the_population_std() -> None:
    rewards, groups = torch.tensor([0.0, 2.0]).double(), torch.tensor([0, 0])
    found = grpo(rewards, groups, torch.tensor([[True, False], [True, True]]), eps=0.0)
    # The sample std would give 0.707.
    assert found.tolist() == [[-1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6])
@pytest.mark.parametrize("reward", [0.0, 0.1, -1e9 / 3])
def test_equal_rewards_have_advantage_exactly_zero(reward: float, eps: float) -> None:
    """Their mean rounds: (0.1 + 0.1 + 0.1) / 3 is not 0.1, and the rest must not be scaled up."""
    rewards = torch.tensor([reward] * 3 + [1.0, 2.0], dtype=torch.float64)
    groups, mask = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, 2, dtype=torch.bool)
    found = grpo(rewards, groups, mask, eps=eps)
    assert not found[:3].any()
    assert bool(found[3:].all()), "the other group is not silenced"
    assert not rloo(rewards, groups, mask)[:3].any()


@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_a_group_of_one_is_refused(estimate: object) -> None:
    assert callable(estimate)
    mask = torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least two responses per prompt"):
        estimate(torch.ones(3), torch.tensor([0, 0, 1]), mask)


@EXAMPLES
@given(case=grouped(dtype=torch.float64), shift=st.floats(-100.0, 100.0))
def test_group_baselines_remove_what_the_prompt_gives(
    case: tuple[Ragged, Tensor, Tensor], shift: float
) -> None:
    batch, rewards, groups = case
    easier = torch.where(groups == groups[0], rewards + shift, rewards)
    for estimate in (rloo, grpo):
        plain = estimate(rewards, groups, batch.mask_BR)
        shifted = estimate(easier, groups, batch.mask_BR)
        torch.testing.assert_close(shifted, plain, atol=1e-6, rtol=1e-6)
        total = sum(plain[groups == groups[0], 0].tolist())
        assert total == pytest.approx(0.0, abs=1e-9)


def test_reinforce_pp_is_whitened_over_the_whole_batch() -> None:
    batch = Ragged(
        mask_BR=torch.arange(5)[None] < torch.tensor([[5], [2], [3]]),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    found = reinforce_pp(batch.numbers(), batch.mask_BR, gamma=0.9)
    real = found[batch.mask_BR].tolist()
    assert statistics.fmean(real) == pytest.approx(0.0, abs=1e-9)
    assert statistics.pvariance(real) == pytest.approx(1.0, rel=1e-6)
    rows = [statistics.fmean(row[m].tolist()) for row, m in zip(found, batch.mask_BR, strict=True)]
    assert max(abs(row) for row in rows) > 0.1, "not row by row"


def test_reinforce_pp_credits_earlier_tokens_with_later_rewards() -> None:
    rewards = torch.tensor([[0.0, 0.0, 4.0], [0.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # To go: 1, 2, 4 and 0 (the nines are padding); mean 1.75, population variance 2.1875.
    found = reinforce_pp(rewards, mask, gamma=0.5)
    expected = [(x - 1.75) / 2.1875**0.5 for x in (1.0, 2.0, 4.0, 0.0)]
    assert found[mask].tolist() == pytest.approx(expected, rel=1e-6)
