"""The clipped losses against the slow reference, their gradients, and how they split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.config.run import RunConfig
from common.config.stages import TrainConfig
from common.logprobs import Sampling
from learner.algorithms.kl import kl_k1, kl_k3
from learner.algorithms.ppo import (
    PolicyLoss,
    entropy,
    mismatch,
    policy_loss,
    value_loss,
    value_unit,
)
from tests import literal
from tests.learner.batch.ragged import EXAMPLES, Ragged, raggeds, same, widen
from tests.likelihoods import chosen_logprobs

CLIPS = st.floats(0.05, 0.4)


def policy_case(batch: Ragged) -> list[Tensor]:
    """logprobs, proximal logprobs (ratios mostly in 0.5 .. 2), advantages, mask."""
    proximal = batch.numbers() - 2.0
    logprobs = proximal + batch.numbers(scale=0.3)
    return [logprobs, proximal, batch.numbers(), batch.mask_BR]


@EXAMPLES
@given(batch=raggeds(), clip=CLIPS, weighted=st.booleans())
def test_policy_loss_is_the_references(batch: Ragged, clip: float, weighted: bool) -> None:
    case = policy_case(batch)
    weights = batch.numbers().exp() if weighted else None
    found = policy_loss(*case, clip_range=clip, normalizer=17.0, importance_weights_BR=weights)
    lists = [x.tolist() for x in case]
    expected = literal.policy_loss(
        *lists,
        clip_range=clip,
        normalizer=17.0,
        weights=None if weights is None else weights.tolist(),
    )
    same(found.loss, expected["loss"], batch.dtype)
    assert int(found.clipped) == expected["clipped"]
    same(found.k3, expected["k3"], batch.dtype)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64))
def test_at_ratio_one_the_loss_is_minus_the_mean_advantage(batch: Ragged) -> None:
    _, logprobs, advantages, mask = policy_case(batch)
    found = policy_loss(
        logprobs, logprobs, advantages, mask, clip_range=0.2, normalizer=batch.tokens
    )
    mean = sum(advantages[mask].tolist()) / batch.tokens
    assert float(found.loss) == pytest.approx(-mean, abs=1e-12)
    assert [float(x) for x in found[1:]] == [0.0, 0.0]


def test_the_mean_is_over_response_tokens_not_over_padding() -> None:
    mask = torch.tensor([[True, True, False, False]])
    advantages = torch.tensor([[1.0, 3.0, 8.0, 8.0]])
    zero = torch.zeros(1, 4)
    found = policy_loss(zero, zero, advantages, mask, clip_range=0.2, normalizer=2.0)
    # An unmasked mean is -5; the mean of the padding (a mask upside down) is -8.
    assert float(found.loss) == -2.0


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(batch: Ragged) -> None:
    """d loss / d logits = - mean of A grad log pi(token), token id 0 trained as any other."""
    vocabulary, mask = 5, batch.mask_BR
    logits = torch.randn(*mask.shape, vocabulary, generator=batch.generator, dtype=torch.float64)
    tokens = torch.randint(0, vocabulary, mask.shape, generator=batch.generator)
    tokens[0, 0] = 0
    advantages = batch.numbers()
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    found = policy_loss(
        logprobs, logprobs.detach(), advantages, mask, clip_range=0.2, normalizer=batch.tokens
    )
    (gradient,) = torch.autograd.grad(found.loss, [logits])
    for b, t in mask.nonzero().tolist():
        chances = literal.softmax(logits[b, t].tolist())
        for v in range(vocabulary):
            grad_logprob = (1.0 if v == int(tokens[b, t]) else 0.0) - chances[v]
            expected = -float(advantages[b, t]) * grad_logprob / batch.tokens
            assert float(gradient[b, t, v]) == pytest.approx(expected, abs=1e-12)
    assert not gradient[~mask].any(), "padding must get no gradient, not even NaN"


def test_token_id_zero_is_trained() -> None:
    """Nothing is ignored for its id, as `ignore_index=0` would: the mask alone decides."""
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    logprobs = chosen_logprobs(logits, tokens, Sampling())
    mask = torch.tensor([[True, True, False]])
    found = policy_loss(
        logprobs, logprobs.detach(), torch.ones(1, 3), mask, clip_range=0.2, normalizer=2.0
    )
    (gradient,) = torch.autograd.grad(found.loss, [logits])
    assert gradient[0, :, 0].tolist() == pytest.approx([-0.375, -0.375, 0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
)
def test_the_clip_stops_the_gradient_only_on_its_own_side(
    ratio: float, advantage: float, flows: bool
) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    found = policy_loss(
        logprobs,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([[advantage]], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
        clip_range=0.2,
        normalizer=1.0,
    )
    (gradient,) = torch.autograd.grad(found.loss, [logprobs])
    assert gradient.item() == pytest.approx(-ratio * advantage if flows else 0.0)
    assert int(found.clipped) == (not flows)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), columns=st.integers(0, 3), clip=CLIPS)
def test_micro_batches_add_up_to_the_whole(batch: Ragged, columns: int, clip: float) -> None:
    """Each row on its own, padded otherwise, normalised by the whole batch's tokens (I3)."""
    case = policy_case(batch)
    weights = batch.numbers().exp()
    total = float(batch.tokens)

    def one(rows: slice, more: int) -> PolicyLoss:
        cut = [widen(x[rows], more) for x in (*case, weights)]
        return policy_loss(
            *cut[:4], clip_range=clip, normalizer=total, importance_weights_BR=cut[4]
        )

    whole = one(slice(None), 0)
    parts = [one(slice(b, b + 1), columns) for b in range(len(batch.mask_BR))]
    for name in ("loss", "clipped", "k3"):
        added = sum(float(getattr(part, name)) for part in parts)
        assert added == pytest.approx(float(getattr(whole, name)), abs=1e-9), name


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), clip=st.none() | CLIPS)
def test_micro_batches_of_the_value_loss_add_up(batch: Ragged, clip: float | None) -> None:
    case = [batch.numbers(), batch.numbers(), batch.numbers(), batch.mask_BR]
    total = float(batch.tokens)
    whole = value_loss(*case, value_clip_range=clip, normalizer=total)
    parts = [
        value_loss(*(widen(x[b : b + 1], b) for x in case), value_clip_range=clip, normalizer=total)
        for b in range(len(batch.mask_BR))
    ]
    assert sum(float(p.loss) for p in parts) == pytest.approx(float(whole.loss), abs=1e-9)
    assert sum(int(p.clipped) for p in parts) == int(whole.clipped)


def test_a_filler_micro_batch_gives_a_zero_loss_and_a_zero_gradient() -> None:
    logprobs, values = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    nothing, other = torch.zeros(2, 3, dtype=torch.bool), torch.randn(2, 3)
    found = policy_loss(logprobs, other, other, nothing, clip_range=0.2, normalizer=5.0)
    regressed = value_loss(values, other, other, nothing, value_clip_range=0.2, normalizer=5.0)
    gradients = torch.autograd.grad(found.loss + regressed.loss, [logprobs, values])
    assert [x.item() for x in (*found, *regressed)] == [0.0] * 5
    assert not any(gradient.any() for gradient in gradients)


@EXAMPLES
@given(batch=raggeds(), clip=st.none() | CLIPS)
def test_value_loss_is_the_references(batch: Ragged, clip: float | None) -> None:
    old = batch.numbers()
    case = [old + batch.numbers(scale=0.5), old, batch.numbers(), batch.mask_BR]
    found = value_loss(*case, value_clip_range=clip, normalizer=9.0)
    loss, clipped = literal.value_loss(*(x.tolist() for x in case), clip_range=clip, normalizer=9.0)
    same(found.loss, loss, batch.dtype)
    assert int(found.clipped) == clipped


def test_the_value_clip_takes_the_greater_error_and_a_half() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    values = torch.tensor([[1.0]], requires_grad=True)
    old, returns = torch.tensor([[0.0]]), torch.tensor([[1.5]])
    clipped = value_loss(values, old, returns, one, value_clip_range=0.5, normalizer=1.0)
    # Clipped to 0.5, an error of 1; unclipped an error of 0.5.
    assert (clipped.loss.item(), int(clipped.clipped)) == (0.5, 1)
    assert torch.autograd.grad(clipped.loss, [values])[0].item() == 0.0
    free = value_loss(values, old, returns, one, value_clip_range=None, normalizer=1.0)
    assert (free.loss.item(), int(free.clipped)) == (0.125, 0)
    # Away from the target the unclipped error is the greater one and keeps its gradient.
    away = value_loss(values, old, -returns, one, value_clip_range=0.5, normalizer=1.0)
    assert (away.loss.item(), int(away.clipped)) == (3.125, 0)
    assert torch.autograd.grad(away.loss, [values])[0].item() == 2.5


@EXAMPLES
@given(batch=raggeds())
def test_metrics_carry_no_gradient(batch: Ragged) -> None:
    case = policy_case(batch)
    case[0].requires_grad_()
    found = policy_loss(*case, clip_range=0.2, normalizer=1.0)
    assert found.loss.requires_grad
    assert not any(x.requires_grad for x in found[1:])


@EXAMPLES
@given(batch=raggeds())
def test_entropy_is_the_references(batch: Ragged) -> None:
    logits = batch.numbers(4, scale=2.0)
    expected = [[literal.entropy(row) for row in rows] for rows in logits[:, :1].tolist()]
    same(entropy(logits)[:, :1], expected, batch.dtype)


def test_entropy_of_the_uniform_and_of_the_certain() -> None:
    assert entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([[[200.0, 0.0]]])).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("sampler", ["fp32", "bf16"])
@pytest.mark.parametrize("learner", ["fp32", "bf16"])
def test_weights_correct_for_age_and_for_precision(
    staleness: int, sampler: str, learner: str
) -> None:
    recipe = {
        "train": {"max_staleness": staleness},
        "rollout": {"precision": sampler},
        "learner": {"precision": learner},
    }
    config = RunConfig.model_validate(recipe)
    assert config.corrects_mismatch == (
        recipe
        != {
            "train": {"max_staleness": 0},
            "rollout": {"precision": "fp32"},
            "learner": {"precision": "fp32"},
        }
    )


def test_kl_estimators_are_unbiased_and_k3_is_never_negative() -> None:
    """Their expectations under p, taken exactly, are KL(p || q)."""
    p_logits, q_logits = [0.3, -1.0, 2.0, 0.0], [1.0, 0.5, 0.2, -0.7]
    p, q = literal.softmax(p_logits), literal.softmax(q_logits)
    ratio = torch.tensor([math.log(a / b) for a, b in zip(p, q, strict=True)]).double()
    chances = torch.tensor(p, dtype=torch.float64)
    expected = literal.kl(p_logits, q_logits)
    assert float((chances * kl_k1(ratio)).sum()) == pytest.approx(expected, rel=1e-6)
    assert float((chances * kl_k3(ratio)).sum()) == pytest.approx(expected, rel=1e-6)
    assert bool((kl_k1(ratio) < 0).any())


@EXAMPLES
@given(x=st.floats(-20.0, 20.0))
def test_k3_is_its_formula(x: float) -> None:
    found = float(kl_k3(torch.tensor(x, dtype=torch.float64)))
    assert found == pytest.approx(math.exp(-x) - 1 + x, rel=1e-6, abs=1e-9)
    assert found >= 0.0


def regress(returns: Tensor, start: Tensor, mask: Tensor, *, share: float, times: int) -> Tensor:
    """Values after so many iterations, each of which minimises the clipped loss as it can."""
    values = start
    for _ in range(times):
        old, clip = values, share * value_unit(values, returns, mask)
        for _ in range(60):
            moved = values.clone().requires_grad_()
            loss = value_loss(moved, old, returns, mask, value_clip_range=clip, normalizer=1.0)
            (gradient,) = torch.autograd.grad(loss.loss, [moved])
            values = values - 0.07 * gradient
    return values


def test_values_arrive_at_far_returns_within_a_few_iterations() -> None:
    """From 0 to returns near 50, with the default; 0.2 an iteration took 250 of them."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    returns = torch.tensor([[50.0, 50.5, 49.0], [51.0, 0.0, 0.0]]).double()
    share = TrainConfig().value_clip_range
    assert share is not None
    found = regress(returns, torch.zeros_like(returns), mask, share=share, times=6)
    assert float((found - returns)[mask].abs().max()) < 1.5


@EXAMPLES
@given(
    batch=raggeds(dtype=torch.float64),
    scale=st.sampled_from([1e-3, 1e3]),
    shift=st.sampled_from([0.0, 50.0]),
    share=st.sampled_from([0.2, 0.5]),
)
def test_values_follow_scale_and_shift_of_the_returns(
    batch: Ragged, scale: float, shift: float, share: float
) -> None:
    mask = batch.mask_BR
    returns, start = batch.numbers(), batch.numbers()
    plain = regress(returns, start, mask, share=share, times=2)
    other = regress((returns + shift) * scale, (start + shift) * scale, mask, share=share, times=2)
    torch.testing.assert_close(other[mask] / scale - shift, plain[mask], rtol=1e-6, atol=1e-6)


def test_the_unit_of_values_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    old, returns = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[4.0, 6.0, math.nan]])
    # Missed by 3 and 4: the root of 12.5, more than the returns' own deviation of 1.
    assert value_unit(old, returns, mask) == pytest.approx(12.5**0.5)
    assert value_unit(returns, returns, mask) == 1.0, "that deviation"
    assert value_unit(returns * 7, returns * 7, mask) == pytest.approx(7.0)
    same_returns = torch.full((1, 3), 5.0)
    assert value_unit(same_returns, same_returns, mask) == 1.0
    assert value_unit(same_returns + 1e-6, same_returns, mask) == 1.0, "rounding is no unit"
    assert value_unit(same_returns + 1e-3, same_returns, mask) == pytest.approx(1e-3, rel=1e-3)


def test_the_mismatch_is_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    behavior = torch.tensor([[-1.0, -2.0, math.nan]])
    proximal = torch.tensor([[-1.0, -2.5, 7.0]])
    found = mismatch(proximal, behavior, mask)
    # d = log behaviour - log proximal = 0.5 on the second token alone.
    assert found.kl == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert found.ratio == pytest.approx(math.exp(0.5))
    assert mismatch(behavior, behavior, mask) == (0.0, 1.0)
