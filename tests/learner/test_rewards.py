"""KL-shaped rewards, the EOS trick and the KL controllers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.rewards import AdaptiveKL, FixedKL, apply_eos_trick, shape_rewards
from tests import reference
from tests.learner.ragged import EXAMPLES, Ragged, raggeds, same, widen


@EXAMPLES
@given(batch=raggeds(), kl_coef=st.floats(0.0, 1.0))
def test_shaped_rewards_are_the_references(batch: Ragged, kl_coef: float) -> None:
    logprobs, ref_logprobs, scores = batch.numbers(), batch.numbers(), batch.per_row()
    found = shape_rewards(scores, logprobs, ref_logprobs, batch.mask_BR, kl_coef=kl_coef)
    lists = [x.tolist() for x in (scores, logprobs, ref_logprobs, batch.mask_BR)]
    same(found, reference.shape_rewards(*lists, kl_coef=kl_coef), batch.dtype)


def test_the_score_is_on_the_last_response_token_not_on_the_first_padding() -> None:
    mask = torch.arange(4)[None] < torch.tensor([[1], [2], [4]])
    zero = torch.zeros(3, 4)
    found = shape_rewards(torch.tensor([5.0, 6.0, 7.0]), zero, zero, mask, kl_coef=0.1)
    assert found.tolist() == [[5.0, 0.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0], [0.0, 0.0, 0.0, 7.0]]


def test_drifting_from_the_reference_costs_and_coming_back_pays() -> None:
    mask = torch.tensor([[True, True, True, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -1.0, -9.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, -1.0, -1.0]])
    found = shape_rewards(torch.tensor([3.0]), logprobs, ref_logprobs, mask, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 0.5, 3.0, 0.0]]


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), columns=st.integers(1, 3))
def test_padding_columns_hold_no_reward(batch: Ragged, columns: int) -> None:
    scores, tensors = batch.per_row(), [batch.numbers(), batch.numbers(), batch.mask_BR]
    narrow = shape_rewards(scores, *tensors, kl_coef=0.1)
    wide = shape_rewards(scores, *(widen(x, columns) for x in tensors), kl_coef=0.1)
    assert torch.equal(wide[:, : narrow.shape[1]], narrow)
    assert not wide[~widen(batch.mask_BR, columns)].any()


def test_a_row_without_a_response_token_is_refused() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    zero = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="no response token"):
        shape_rewards(torch.ones(2), zero, zero, mask, kl_coef=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused_by_row(bad: float) -> None:
    mask, zero = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="row 1 has a score"):
        shape_rewards(torch.tensor([1.0, bad, 1.0]), zero, zero, mask, kl_coef=0.1)
    broken = zero.clone()
    broken[2, 0] = bad
    with pytest.raises(ValueError, match="row 2 has a score"):
        shape_rewards(torch.ones(3), broken, zero, mask, kl_coef=0.1)


def test_the_eos_trick_replaces_the_score_of_what_never_ended() -> None:
    scores = torch.tensor([4.0, -7.0, 2.0], dtype=torch.float64)
    found = apply_eos_trick(scores, torch.tensor([True, False, False]), penalty=-1.0)
    assert found.dtype == torch.float64
    # Replaced, not lowered: -7 becomes -1.
    assert found.tolist() == [4.0, -1.0, -1.0]
    assert scores.tolist() == [4.0, -7.0, 2.0], "the argument is left as it was"


@EXAMPLES
@given(
    kls=st.lists(st.floats(-5.0, 30.0), min_size=1, max_size=8),
    n=st.integers(1, 2000),
    target=st.floats(0.5, 12.0),
    horizon=st.integers(2000, 20_000),
)
def test_the_adaptive_controller_is_zieglers(
    kls: list[float], n: int, target: float, horizon: int
) -> None:
    controller, expected = AdaptiveKL(0.1, target, horizon), 0.1
    for kl in kls:
        controller.update(kl, n)
        expected = reference.adaptive_kl(expected, kl, n, target, horizon)
        assert controller.coef == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.00512), (1000.0, 1.01024), (0.0, 0.98976), (-1000.0, 0.98976)],
)
def test_the_adaptive_step_by_hand(kl: float, factor: float) -> None:
    """Target 6, horizon 10000, 512 rollouts; the error is clipped to +-0.2."""
    controller = AdaptiveKL(0.2, 6.0, 10_000)
    controller.update(kl, 512)
    assert controller.coef == pytest.approx(0.2 * factor, rel=1e-9)


def test_the_fixed_controller_stays() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, 512)
    assert controller.coef == 0.05


def test_a_restored_controller_goes_on_as_the_old_one() -> None:
    old = AdaptiveKL(0.1, 6.0, 1000)
    old.update(9.0, 100)
    new = AdaptiveKL(0.7, 6.0, 1000)
    new.load_state_dict(old.state_dict())
    for controller in (old, new):
        controller.update(5.5, 100)
    assert new.coef == old.coef
    fixed = FixedKL(0.7)
    fixed.load_state_dict(FixedKL(0.05).state_dict())
    assert fixed.coef == 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("controller", [FixedKL(0.1), AdaptiveKL(0.1, 6.0, 1000)])
def test_controllers_refuse_what_is_not_finite_and_stay(controller: FixedKL, bad: float) -> None:
    with pytest.raises(ValueError, match="KL is"):
        controller.update(bad, 8)
    with pytest.raises(ValueError, match="KL coefficient is"):
        controller.load_state_dict({"coef": bad})
    with pytest.raises(ValueError, match="KL coefficient is"):
        FixedKL(bad)
    assert controller.coef == 0.1
