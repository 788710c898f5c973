"""Advantages, masked moments and whitening against the slow reference, and their identities."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.gae import explained_variance, gae, masked_moments, whiten, within_rounding
from tests import literal
from tests.learner.batch.ragged import EXAMPLES, Ragged, raggeds, same, widen

FRACTIONS = st.floats(0.0, 1.0)


@EXAMPLES
@given(batch=raggeds(), gamma=FRACTIONS, lam=FRACTIONS)
def test_gae_is_the_papers_sum(batch: Ragged, gamma: float, lam: float) -> None:
    rewards, values, mask = batch.numbers(), batch.numbers(), batch.mask_BR
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    expected = literal.gae(rewards.tolist(), values.tolist(), mask.tolist(), gamma, lam)
    same(advantages, expected[0], batch.dtype)
    same(returns, expected[1], batch.dtype)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), gamma=FRACTIONS)
def test_lambda_one_is_monte_carlo_minus_value(batch: Ragged, gamma: float) -> None:
    rewards, values, mask = batch.numbers(), batch.numbers(), batch.mask_BR
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    for row, real in enumerate(mask.sum(1).tolist()):
        for t in range(real):
            togo = sum(gamma ** (k - t) * float(rewards[row, k]) for k in range(t, real))
            assert float(returns[row, t]) == pytest.approx(togo, abs=1e-9)
            assert float(advantages[row, t]) == pytest.approx(togo - float(values[row, t]))


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), gamma=FRACTIONS)
def test_lambda_zero_is_the_td_error(batch: Ragged, gamma: float) -> None:
    rewards, values, mask = batch.numbers(), batch.numbers(), batch.mask_BR
    advantages, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    for row, real in enumerate(mask.sum(1).tolist()):
        ahead = [*values[row, 1:real].tolist(), 0.0]
        for t in range(real):
            delta = float(rewards[row, t]) + gamma * ahead[t] - float(values[row, t])
            assert float(advantages[row, t]) == pytest.approx(delta)


@EXAMPLES
@given(batch=raggeds(), columns=st.integers(1, 4))
def test_padding_columns_change_nothing(batch: Ragged, columns: int) -> None:
    tensors = [batch.numbers(), batch.numbers(), batch.mask_BR]
    narrow = gae(*tensors, gamma=0.97, gae_lambda=0.9)
    wide = gae(*(widen(x, columns) for x in tensors), gamma=0.97, gae_lambda=0.9)
    reach = batch.mask_BR.shape[1]
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one, other[:, :reach])
        assert not other[:, reach:].any()
    whitened = whiten(widen(tensors[0], columns), widen(batch.mask_BR, columns))
    same(whitened[:, :reach], whiten(tensors[0], batch.mask_BR).tolist(), batch.dtype)


def test_the_value_after_the_last_response_token_is_zero() -> None:
    mask = torch.tensor([[True, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 50.0]])
    values = torch.tensor([[0.25, 0.5, 100.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    # delta = (0 + 0.5 - 0.25, 1 + 0 - 0.5); the 100 and the 50 of the padding are nowhere.
    assert advantages.tolist() == [[0.5, 0.5, 0.0]]
    assert returns.tolist() == [[0.75, 1.0, 0.0]]


@EXAMPLES
@given(batch=raggeds())
def test_moments_are_the_populations_over_the_mask(batch: Ragged) -> None:
    x = batch.numbers()
    mean, variance, count = masked_moments(x, batch.mask_BR)
    real = x[batch.mask_BR].double().tolist()
    assert {mean.dtype, variance.dtype, count.dtype} == {torch.float64}
    assert float(mean) == pytest.approx(statistics.fmean(real), abs=1e-12)
    assert float(variance) == pytest.approx(statistics.pvariance(real), abs=1e-12)
    assert float(count) == len(real)


def test_moments_neither_average_padding_nor_divide_by_n_minus_one() -> None:
    x = torch.tensor([[1.0, 3.0, 0.0, 0.0]])
    mean, variance, count = masked_moments(x, torch.tensor([[True, True, False, False]]))
    assert (float(mean), float(variance), float(count)) == (2.0, 1.0, 2.0)
    assert float(x.mean()) == 1.0, "what an unmasked mean would give"
    assert float(x[0, :2].var()) == 2.0, "what the sample variance would give"


def test_moments_of_float32_are_computed_in_float64() -> None:
    offset = 2.0**20
    x = torch.tensor([[offset, offset + 0.125, offset + 0.25]], dtype=torch.float32)
    _, variance, _ = masked_moments(x, torch.ones(1, 3, dtype=torch.bool))
    assert float(variance) == pytest.approx(statistics.pvariance([0.0, 0.125, 0.25]), rel=1e-9)


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        masked_moments(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@EXAMPLES
@given(batch=raggeds(), shift=st.booleans(), eps=st.sampled_from([1e-8, 1e-3]))
def test_whitening_is_the_references(batch: Ragged, shift: bool, eps: float) -> None:
    x, mask = batch.numbers(scale=3.0) + 2.0, batch.mask_BR
    found = whiten(x, mask, shift_mean=shift, eps=eps)
    same(found, literal.whiten(x.tolist(), mask.tolist(), shift, eps), batch.dtype)
    assert not found[~mask].any()


def test_whitened_numbers_have_mean_zero_and_population_variance_one() -> None:
    # As many padded as real entries: an unmasked or a sample variance would be far from 1.
    mask = torch.arange(6)[None] < torch.tensor([[2], [4], [3], [1]])
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 7
    real = whiten(x, mask)[mask].tolist()
    assert statistics.fmean(real) == pytest.approx(0.0, abs=1e-9)
    assert statistics.pvariance(real) == pytest.approx(1.0, rel=1e-8)
    kept = whiten(x, mask, shift_mean=False)[mask].tolist()
    assert statistics.fmean(kept) == pytest.approx(statistics.fmean(x[mask].tolist()))
    assert statistics.pvariance(kept) == pytest.approx(1.0, rel=1e-8)


def test_whitening_equal_numbers_gives_zero_not_nan() -> None:
    mask = torch.tensor([[True, True, False]])
    found = whiten(torch.tensor([[0.5, 0.5, math.nan]]), mask)
    assert found.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("size", [1e-6, 0.1, 1000.0, 1e9])
def test_equal_numbers_have_no_spread_whatever_their_size(size: float) -> None:
    """float32 tells no two of them apart: whitened, their rounding would have deviation 1."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.full((4, 6), size, dtype=torch.float64)
    noise = torch.randn(4, 6, generator=generator, dtype=torch.float64) * size * 1e-7
    mask = torch.arange(6)[None] < torch.tensor([[6], [3], [1], [5]])
    for x in (exact, exact + noise, (exact + noise).float()):
        assert within_rounding(x, mask)
        assert not whiten(x, mask).any()
    apart = exact.clone()
    apart[0, 0] *= 1.001
    assert not within_rounding(apart, mask)
    # One of 15 entries stands out: (1 - 1/15) / sqrt(1/15 * 14/15).
    assert float(whiten(apart, mask, eps=0.0)[0, 0]) == pytest.approx(14**0.5, rel=1e-6)


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    returns = torch.tensor([[1.0, 3.0, 1.0, 3.0, math.nan]])
    values = torch.tensor([[1.5, 2.5, 1.5, 2.5, 0.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.zeros(1, 5), returns, mask) == 0.0
    assert explained_variance(values, returns, mask) == pytest.approx(0.75)
    # Whatever the unit, and 0 where nothing differs.
    assert explained_variance(values * 1e-6, returns * 1e-6, mask) == pytest.approx(0.75)
    assert explained_variance(values, torch.full((1, 5), 50.0), mask) == 0.0
