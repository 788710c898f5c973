"""Critic-free estimators against the slow reference, and what each must not depend on."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.advantages import (
    centred,
    centred_to_go,
    grpo,
    reinforce_pp,
    rloo,
)
from learner.algorithms.estimators import ESTIMATORS, Outcomes
from learner.algorithms.rewards import reward_parts
from tests import literal
from tests.learner.batch.ragged import EXAMPLES, Ragged, raggeds, same, widen


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
    same(found, literal.rloo(*lists), batch.dtype)


@EXAMPLES
@given(case=grouped(), eps=st.sampled_from([1e-8, 1e-4, 0.1]))
def test_grpo_is_the_references(case: tuple[Ragged, Tensor, Tensor], eps: float) -> None:
    batch, rewards, groups = case
    found = grpo(rewards, groups, batch.mask_BR, eps=eps)
    lists = [x.tolist() for x in (rewards, groups, batch.mask_BR)]
    same(found, literal.grpo(*lists, eps=eps), batch.dtype)


@EXAMPLES
@given(batch=raggeds(), gamma=st.floats(0.0, 1.0))
def test_reinforce_pp_is_the_references(batch: Ragged, gamma: float) -> None:
    rewards, mask = batch.numbers(), batch.mask_BR
    found = reinforce_pp(rewards, mask, gamma=gamma)
    expected = literal.reinforce_pp(rewards.tolist(), mask.tolist(), gamma, 1e-8)
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


GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
LENGTHS = torch.tensor([[5], [2], [3], [1], [4], [4]])


def by_hand(algorithm: str, kl_coef: float, score: float, noise: float) -> tuple[Tensor, Tensor]:
    """Advantages where all scores are equal and log-probabilities differ from the reference's by
    this much; and what the KL alone makes of them, in plain numbers."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5)[None] < LENGTHS
    distance = torch.randn(6, 5, generator=generator, dtype=torch.float64) * noise
    logprobs = torch.full((6, 5), -2.0).double()
    parts = reward_parts(
        torch.full((6,), score, dtype=torch.float32),
        logprobs + distance,
        logprobs,
        mask,
        kl_coef=kl_coef,
    )
    outcomes = Outcomes(
        rewards=parts,
        values_BR=torch.zeros(6, 5),
        groups_B=GROUPS,
        mask_BR=mask,
        gamma=1.0,
        gae_lambda=1.0,
    )
    found, returns = ESTIMATORS[algorithm](outcomes)
    assert returns is None, "nothing for a value function to learn"
    kls = [[float(distance[b, t]) for t in range(int(LENGTHS[b]))] for b in range(6)]
    expected = torch.zeros(6, 5, dtype=torch.float64)
    tokens = [sum(row[t:]) for row in kls for t in range(len(row))]
    for b in range(6):
        others = [sum(kls[o]) for o in range(6) if int(GROUPS[o]) == int(GROUPS[b])]
        for t in range(len(kls[b])):
            if algorithm == "grpo":
                away = sum(kls[b]) - statistics.fmean(others)
            elif algorithm == "rloo":
                away = (sum(kls[b]) - statistics.fmean(others)) * 3 / 2
            else:
                away = sum(kls[b][t:]) - statistics.fmean(tokens)
            expected[b, t] = -kl_coef * away
    return found, expected


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce_pp"])
@pytest.mark.parametrize("score", [0.0, 0.1, 1.0, -1e3])
@pytest.mark.parametrize("noise", [1e-6, 0.02])
def test_equal_scores_leave_the_penalty_and_nothing_else(
    algorithm: str, score: float, noise: float
) -> None:
    """The noise of bf16 (0.02 nats a token) stays 0.02 times kl_coef: it is not scaled up to 1."""
    found, expected = by_hand(algorithm, 0.05, score, noise)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-6)
    assert 0.0 < float(found.abs().max()) < 0.5 * noise
    without, _ = by_hand(algorithm, 0.0, score, noise)
    assert not without.any(), "exactly"


@pytest.mark.parametrize("score", [0.7, 50.0, -3e4])
def test_scores_that_differ_by_rounding_are_equal(score: float) -> None:
    """Weighted sums of components, or one response in two batches: last bits of float32."""
    scores = torch.tensor([score] * 3, dtype=torch.float32)
    scores[1] = torch.nextafter(scores[1], torch.tensor(1e9))
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert not grpo(scores, torch.zeros(3, dtype=torch.int64), mask).any()
    rewards = torch.zeros(3, 2)
    rewards[:, 1] = scores
    assert not reinforce_pp(rewards, mask, gamma=1.0).any()


@EXAMPLES
@given(
    case=grouped(dtype=torch.float64),
    scale=st.sampled_from([1e-2, 1e3]),
    shift=st.sampled_from([0.0, 50.0]),
)
def test_normalised_scores_have_neither_scale_nor_shift(
    case: tuple[Ragged, Tensor, Tensor], scale: float, shift: float
) -> None:
    batch, scores, groups = case
    plain = grpo(scores, groups, batch.mask_BR, eps=0.0)
    other = grpo(scores * scale + shift, groups, batch.mask_BR, eps=0.0)
    torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-6)


@EXAMPLES
@given(case=grouped(dtype=torch.float64), gamma=st.floats(0.0, 1.0))
def test_penalties_are_centred_and_keep_their_size(
    case: tuple[Ragged, Tensor, Tensor], gamma: float
) -> None:
    batch, penalties, groups = case
    found = centred(penalties, groups, batch.mask_BR)
    tokens = batch.numbers()
    ahead = centred_to_go(tokens, batch.mask_BR, gamma=gamma)
    togo = []
    for b, real in enumerate(batch.mask_BR.sum(1).tolist()):
        own = [float(p) for p, g in zip(penalties, groups, strict=True) if g == groups[b]]
        assert float(found[b, 0]) == pytest.approx(
            float(penalties[b]) - statistics.fmean(own), abs=1e-9
        )
        row = tokens[b, :real].tolist()
        togo += [sum(gamma ** (k - t) * row[k] for k in range(t, real)) for t in range(real)]
    mean = statistics.fmean(togo)
    assert ahead[batch.mask_BR].tolist() == pytest.approx([x - mean for x in togo], abs=1e-9)
    assert not ahead[~batch.mask_BR].any()
