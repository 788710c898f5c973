"""KL-shaped rewards, the EOS trick and the KL controllers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.recipe import load_config
from common.errors import ConfigError
from learner.algorithms.gae import gae
from learner.algorithms.rewards import AdaptiveKL, FixedKL, apply_eos_trick, reward_parts
from tests import literal
from tests.learner.batch.ragged import EXAMPLES, Ragged, raggeds, same, widen


def whole_rewards(*tensors: torch.Tensor, kl_coef: float) -> torch.Tensor:
    return reward_parts(*tensors, kl_coef=kl_coef).total_BR


@EXAMPLES
@given(batch=raggeds(), kl_coef=st.floats(0.0, 1.0))
def test_shaped_rewards_are_the_references(batch: Ragged, kl_coef: float) -> None:
    logprobs, ref_logprobs, scores = batch.numbers(), batch.numbers(), batch.per_row()
    found = whole_rewards(scores, logprobs, ref_logprobs, batch.mask_BR, kl_coef=kl_coef)
    lists = [x.tolist() for x in (scores, logprobs, ref_logprobs, batch.mask_BR)]
    same(found, literal.shape_rewards(*lists, kl_coef=kl_coef), batch.dtype)


def test_the_score_is_on_the_last_response_token_not_on_the_first_padding() -> None:
    mask = torch.arange(4)[None] < torch.tensor([[1], [2], [4]])
    zero = torch.zeros(3, 4)
    found = whole_rewards(torch.tensor([5.0, 6.0, 7.0]), zero, zero, mask, kl_coef=0.1)
    assert found.tolist() == [[5.0, 0.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0], [0.0, 0.0, 0.0, 7.0]]


def test_drifting_from_the_reference_costs_and_coming_back_pays() -> None:
    mask = torch.tensor([[True, True, True, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -1.0, -9.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, -1.0, -1.0]])
    found = whole_rewards(torch.tensor([3.0]), logprobs, ref_logprobs, mask, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 0.5, 3.0, 0.0]]


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64))
def test_the_parts_are_what_the_whole_is_without_the_other(batch: Ragged) -> None:
    scores, logprobs, ref = batch.per_row(), batch.numbers(), batch.numbers()
    parts = reward_parts(scores, logprobs, ref, batch.mask_BR, kl_coef=0.3)
    lists = [logprobs.tolist(), ref.tolist(), batch.mask_BR.tolist()]
    same(
        parts.scores_BR,
        literal.shape_rewards(scores.tolist(), *lists, kl_coef=0.0),
        torch.float64,
    )
    none = [0.0] * len(scores)
    same(parts.penalties_BR, literal.shape_rewards(none, *lists, kl_coef=0.3), torch.float64)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), columns=st.integers(1, 3))
def test_padding_columns_hold_no_reward(batch: Ragged, columns: int) -> None:
    scores, tensors = batch.per_row(), [batch.numbers(), batch.numbers(), batch.mask_BR]
    narrow = whole_rewards(scores, *tensors, kl_coef=0.1)
    wide = whole_rewards(scores, *(widen(x, columns) for x in tensors), kl_coef=0.1)
    assert torch.equal(wide[:, : narrow.shape[1]], narrow)
    assert not wide[~widen(batch.mask_BR, columns)].any()


def test_a_row_without_a_response_token_is_refused() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    zero = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="no response token"):
        whole_rewards(torch.ones(2), zero, zero, mask, kl_coef=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused_by_row(bad: float) -> None:
    mask, zero = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="row 1 has a score"):
        whole_rewards(torch.tensor([1.0, bad, 1.0]), zero, zero, mask, kl_coef=0.1)
    broken = zero.clone()
    broken[2, 0] = bad
    with pytest.raises(ValueError, match="row 2 has a score"):
        whole_rewards(torch.ones(3), broken, zero, mask, kl_coef=0.1)


def test_the_eos_trick_is_by_hand() -> None:
    scores = torch.tensor([4.0, 2.0, 3.5, -7.0, 9.0], dtype=torch.float64)
    ended = torch.tensor([True, True, False, False, False])
    found = apply_eos_trick(scores, ended, penalty=-2.0)
    assert found.dtype == torch.float64
    # Of what ended: mean 3, deviation 1. Lowered to 3 - 2, never raised: -7 stays.
    assert found.tolist() == [4.0, 2.0, 1.0, -7.0, 1.0]
    assert scores.tolist() == [4.0, 2.0, 3.5, -7.0, 9.0], "the argument is left as it was"


@pytest.mark.parametrize(
    ("scores", "ended", "expected"),
    [
        # Nothing ended, or nothing of which a spread could be taken: the penalty itself.
        ([2.0, -3.0], [False, False], [-1.0, -3.0]),
        ([4.0, 2.0, -7.0], [True, False, False], [4.0, -1.0, -7.0]),
        # All that ended score the same, and less than the penalty.
        ([-3.0, -3.0, 5.0, -3.0], [True, True, False, False], [-3.0] * 4),
        ([0.1, 0.1, 0.1, 0.1], [True, True, True, False], [0.1, 0.1, 0.1, -1.0]),
    ],
)
def test_the_eos_trick_without_a_spread(
    scores: list[float], ended: list[bool], expected: list[float]
) -> None:
    found = apply_eos_trick(torch.tensor(scores), torch.tensor(ended), penalty=-1.0)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@EXAMPLES
@given(
    rows=st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=1, max_size=12),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 100.0]),
    penalty=st.sampled_from([0.0, -1.0, -3.0]),
)
def test_never_ending_never_pays(
    rows: list[tuple[float, bool]], scale: float, shift: float, penalty: float
) -> None:
    scores = (torch.tensor([score for score, _ in rows]).double() + shift) * scale
    ended = torch.tensor([end for _, end in rows])
    found = apply_eos_trick(scores, ended, penalty=penalty)
    assert found.tolist() == pytest.approx(
        literal.eos_trick(scores.tolist(), ended.tolist(), penalty),
        rel=1e-5,
        abs=1e-5 * scale,
    )
    assert torch.equal(found[ended], scores[ended]), "what ended keeps its score"
    assert bool((found <= scores).all()), "no score is raised"
    if bool(ended.any()):
        most = float(scores[ended].mean())
        assert bool((found[~ended] <= most + 1e-9 * abs(most)).all()), "nor above those that ended"


def test_a_penalty_that_pays_is_refused() -> None:
    with pytest.raises(ConfigError, match="missing_eos_penalty: should be less than or equal to 0"):
        load_config(None, ["train.missing_eos_penalty=1.0"])
    assert load_config(None, ["train.missing_eos_penalty=null"]).train.missing_eos_penalty is None


@EXAMPLES
@given(
    kls=st.lists(st.floats(-5.0, 30.0), min_size=1, max_size=8),
    n=st.integers(1, 2000),
    target=st.floats(0.5, 12.0),
    horizon=st.integers(1, 20_000),
)
def test_the_adaptive_controller_is_zieglers(
    kls: list[float], n: int, target: float, horizon: int
) -> None:
    controller, expected = AdaptiveKL(0.1, target, horizon), 0.1
    for kl in kls:
        controller.update(kl, n)
        expected = literal.adaptive_kl(expected, kl, n, target, horizon)
        assert controller.coef == pytest.approx(expected, rel=1e-9)
        assert controller.coef > 0.0


@pytest.mark.parametrize("n", [1000, 5000, 8192, 10**9])
def test_a_batch_beyond_the_horizon_counts_as_one_horizon(n: int) -> None:
    """Of 8192 rollouts and a horizon of 1000, 1 - 0.2 * 8.192 was -0.64."""
    controller = AdaptiveKL(0.05, 6.0, 1000)
    controller.update(0.0, n)
    assert controller.coef == pytest.approx(0.05 * 0.8)
    controller.update(60.0, n)
    assert controller.coef == pytest.approx(0.05 * 0.8 * 1.2)


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
    with pytest.raises(ValueError, match=r"KL coefficient is -0\.032"):
        controller.load_state_dict({"coef": -0.032})
    assert controller.coef == 0.1


def test_rewards_on_tokens_reach_their_tokens() -> None:
    """What is left of the score is on the last response token; at lambda 1 a token's return is all
    that follows it."""
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    zero = torch.zeros(2, 4, dtype=torch.float64)
    nan = float("nan")
    planted = torch.tensor([[0.0, 2.0, 0.5, nan], [1.0, nan, nan, nan]], dtype=torch.float64)
    parts = reward_parts(
        torch.tensor([3.0, -1.0], dtype=torch.float64),
        zero,
        zero,
        mask,
        kl_coef=0.1,
        token_scores_BR=planted,
    )
    assert parts.scores_BR.tolist() == [[0.0, 2.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
    assert parts.per_sequence()[0].tolist() == [3.0, -1.0]
    _, returns = gae(parts.total_BR, zero, mask, gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == [[3.0, 3.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
