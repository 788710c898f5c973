"""Objectives after PPO against slow references, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms import surrogates
from learner.algorithms.advantages import centred
from learner.algorithms.gae import gae, length_lambda
from learner.algorithms.kl import KlEstimator, kl_terms
from learner.algorithms.ppo import PolicyLoss, policy_loss
from learner.algorithms.rewards import overlong_penalty
from learner.algorithms.surrogates import Aggregation, Surrogate
from tests import literal
from tests.learner.algorithms.test_ppo import policy_case
from tests.learner.batch.ragged import EXAMPLES, Ragged, raggeds, same, widen

LONGEST = 9
SURROGATES = st.builds(
    Surrogate,
    ratio=st.sampled_from(["token", "sequence"]),
    clip=st.sampled_from(["objective", "weight"]),
    clip_high=st.none() | st.floats(0.05, 0.6),
    dual_clip=st.none() | st.floats(1.1, 4.0),
    aggregation=st.sampled_from(["tokens", "sequences", "constant"]),
)


def normalizer(aggregation: Aggregation, mask_BR: Tensor) -> float:
    return surrogates.normalizer(
        aggregation,
        tokens=float(mask_BR.sum()),
        sequences=float(len(mask_BR)),
        longest=LONGEST,
    )


def loss_of(case: list[Tensor], surrogate: Surrogate, low: float = 0.2) -> PolicyLoss:
    total = normalizer(surrogate.aggregation, case[3])
    return policy_loss(*case, clip_range=low, normalizer=total, surrogate=surrogate)


@EXAMPLES
@given(batch=raggeds(), surrogate=SURROGATES, low=st.floats(0.05, 0.4))
def test_every_objective_is_its_reference(batch: Ragged, surrogate: Surrogate, low: float) -> None:
    case = policy_case(batch)
    expected = literal.surrogate_loss(
        *(x.tolist() for x in case),
        low=low,
        high=surrogate.clip_high or low,
        ratio=surrogate.ratio,
        clip_weight=surrogate.clip == "weight",
        dual=surrogate.dual_clip,
        aggregation=surrogate.aggregation,
        longest=LONGEST,
    )
    same(loss_of(case, surrogate, low).loss, expected, batch.dtype)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), surrogate=SURROGATES, columns=st.integers(0, 3))
def test_micro_batches_add_up_to_the_whole(
    batch: Ragged, surrogate: Surrogate, columns: int
) -> None:
    case = policy_case(batch)
    total = normalizer(surrogate.aggregation, batch.mask_BR)
    parts = [
        policy_loss(
            *(widen(x[b : b + 1], columns) for x in case),
            clip_range=0.2,
            normalizer=total,
            surrogate=surrogate,
        )
        for b in range(len(batch.mask_BR))
    ]
    whole = loss_of(case, surrogate)
    assert sum(float(p.loss) for p in parts) == pytest.approx(float(whole.loss), abs=1e-9)
    assert sum(int(p.clipped) for p in parts) == int(whole.clipped)


def gradient(case: list[Tensor], surrogate: Surrogate) -> Tensor:
    logprobs = case[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss_of([logprobs, *case[1:]], surrogate).loss, logprobs)
    return found


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), surrogate=SURROGATES)
def test_padding_gets_no_gradient(batch: Ragged, surrogate: Surrogate) -> None:
    found = gradient(policy_case(batch), surrogate)
    assert bool((found[~batch.mask_BR] == 0).all())
    assert bool(found.isfinite().all())


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), high=st.floats(0.05, 0.6))
def test_a_sequence_of_one_token_has_the_tokens_own_ratio(batch: Ragged, high: float) -> None:
    """GSPO of responses of one token is GRPO, value and gradient."""
    case = [x[:, :1] for x in policy_case(batch)]
    one = Surrogate(ratio="sequence", clip_high=high, aggregation="sequences")
    other = Surrogate(ratio="token", clip_high=high, aggregation="sequences")
    assert torch.equal(loss_of(case, one).loss, loss_of(case, other).loss)
    assert torch.equal(gradient(case, one), gradient(case, other))


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), low=st.floats(0.05, 0.4))
def test_equal_bounds_are_ppo(batch: Ragged, low: float) -> None:
    case = policy_case(batch)
    tokens = float(batch.tokens)
    ppo = policy_loss(*case, clip_range=low, normalizer=tokens)
    higher = policy_loss(
        *case, clip_range=low, normalizer=tokens, surrogate=Surrogate(clip_high=low)
    )
    assert torch.equal(ppo.loss, higher.loss)
    assert torch.equal(ppo.clipped, higher.clipped)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), surrogate=SURROGATES)
def test_on_policy_all_have_the_policy_gradient(batch: Ragged, surrogate: Surrogate) -> None:
    """At ratio 1 no clip acts, and the gradient is -A by token, or by mean of the response."""
    _, logprobs, advantages, mask = policy_case(batch)
    per_sequence = advantages.masked_fill(~mask, 0.0).sum(1, keepdim=True) / mask.sum(1, True)
    if surrogate.ratio == "sequence" and surrogate.clip == "objective":
        advantages = per_sequence.expand_as(advantages)
    weights = surrogates.row_weights(mask, surrogate.aggregation)
    expected = -advantages.masked_fill(~mask, 0.0) / normalizer(surrogate.aggregation, mask)
    expected = expected if weights is None else expected * weights
    found = gradient([logprobs, logprobs, advantages, mask], surrogate)
    torch.testing.assert_close(found, expected)


def test_what_a_clipped_weight_keeps_and_a_clipped_objective_loses() -> None:
    """A token whose ratio rose beyond the clip, and that was good: CISPO still learns from it."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    proximal, logprobs = torch.tensor([[-2.0]]), torch.tensor([[-1.0]])
    case = [logprobs, proximal, torch.ones(1, 1), mask]
    assert float(gradient(case, Surrogate())) == 0.0
    assert float(gradient(case, Surrogate(clip="weight"))) == pytest.approx(-1.2)


def test_a_dual_clip_bounds_the_loss_of_a_token_that_became_probable() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    proximal, logprobs = torch.tensor([[-6.0]]), torch.tensor([[-1.0]])
    case = [logprobs, proximal, -torch.ones(1, 1), mask]
    free, bound = loss_of(case, Surrogate()), loss_of(case, Surrogate(dual_clip=3.0))
    assert float(free.loss) == pytest.approx(math.exp(5.0))
    assert (float(bound.loss), int(bound.clipped)) == (3.0, 1)
    assert float(gradient(case, Surrogate(dual_clip=3.0))) == 0.0


# ------------------------------------------------------------------------------ KL in the loss

LOGITS, REFERENCE, OLD = [0.3, -1.0, 2.0, 0.0], [1.0, 0.5, 0.2, -0.7], [0.1, 0.4, 1.0, -0.2]


def expected_gradient(estimator: KlEstimator, drawn: list[float]) -> Tensor:
    """Gradient of the terms' expectation over a small vocabulary, with samples of `drawn`."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(drawn, dtype=torch.float64).log_softmax(0)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log_softmax(0)
    now = logits.log_softmax(0)
    terms = kl_terms((now - old)[None], now[None], ref[None], estimator)
    (found,) = torch.autograd.grad((old.exp() * terms[0]).sum(), logits)
    return found


def true_gradient(*, reverse: bool) -> Tensor:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    now = logits.log_softmax(0)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log_softmax(0)
    kl = (now.exp() * (now - ref)).sum() if reverse else (ref.exp() * (ref - now)).sum()
    (found,) = torch.autograd.grad(kl, logits)
    return found


@pytest.mark.parametrize("drawn", [LOGITS, OLD], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize(
    ("estimator", "reverse"), [("k2", True), ("unbiased", True), ("k3", False)]
)
def test_gradients_of_the_kl_terms_by_enumeration(
    estimator: KlEstimator, reverse: bool, drawn: list[float]
) -> None:
    torch.testing.assert_close(
        expected_gradient(estimator, drawn), true_gradient(reverse=reverse), atol=1e-9, rtol=1e-9
    )


def test_the_gradient_of_k1_on_fixed_samples_is_nothing() -> None:
    """Why there is no k1 in the loss."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    now = logits.log_softmax(0)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log_softmax(0)
    (found,) = torch.autograd.grad((now.detach().exp() * (now - ref)).sum(), logits)
    torch.testing.assert_close(found, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", ["k3", "unbiased"])
def test_the_terms_expectation_is_the_kl(estimator: KlEstimator) -> None:
    now, old, ref = (
        torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in (LOGITS, OLD, REFERENCE)
    )
    terms = kl_terms((now - old)[None], now[None], ref[None], estimator)
    assert float((old.exp() * terms[0]).sum()) == pytest.approx(literal.kl(LOGITS, REFERENCE))


# ------------------------------------------------------------- weights, advantages and penalties


@EXAMPLES
@given(
    batch=raggeds(),
    cap=st.floats(1.0, 4.0),
    sequence=st.booleans(),
    leave_out=st.booleans(),
)
def test_weights_of_samples_of_another_policy(
    batch: Ragged, cap: float, sequence: bool, leave_out: bool
) -> None:
    mask = batch.mask_BR
    proximal, behavior = batch.numbers().requires_grad_(), batch.numbers()
    found = surrogates.mismatch_weights(
        proximal - behavior,
        mask,
        level="sequence" if sequence else "token",
        outside="mask" if leave_out else "truncate",
        cap=cap,
    )
    assert not found.requires_grad
    expected = literal.mismatch_weights(
        proximal.tolist(),
        behavior.tolist(),
        mask.tolist(),
        sequence=sequence,
        leave_out=leave_out,
        cap=cap,
    )
    same(found[mask], torch.tensor(expected)[mask], batch.dtype)


def test_weights_survive_an_overflowing_ratio() -> None:
    apart, mask = torch.full((1, 2), 400.0), torch.ones(1, 2, dtype=torch.bool)
    for level in ("token", "sequence"):
        held = surrogates.mismatch_weights(apart, mask, level=level, outside="truncate", cap=5.0)
        assert held.tolist() == [[5.0, 5.0]]
        gone = surrogates.mismatch_weights(apart, mask, level=level, outside="mask", cap=5.0)
        assert gone.tolist() == [[0.0, 0.0]]


@EXAMPLES
@given(batch=raggeds(rows=8))
def test_centred_rewards_are_dr_grpos(batch: Ragged) -> None:
    rewards = batch.per_row()
    groups = torch.arange(len(rewards)) // 2
    found = centred(rewards, groups, batch.mask_BR)
    expected = literal.dr_grpo(rewards.tolist(), groups.tolist(), batch.mask_BR.tolist())
    same(found, expected, batch.dtype)


@given(length=st.integers(1, 60), buffer=st.integers(1, 50), penalty=st.floats(0.1, 2.0))
def test_the_overlong_penalty_is_its_reference(length: int, buffer: int, penalty: float) -> None:
    found = overlong_penalty(torch.tensor([length]), longest=50, buffer=buffer, penalty=penalty)
    assert float(found) == pytest.approx(literal.overlong(length, 50, buffer, penalty), abs=1e-9)


def test_lambda_follows_the_length() -> None:
    """At alpha = 0.05 a response of 200 tokens has 0.9; each row is estimated with its own."""
    mask = torch.arange(200)[None] < torch.tensor([[200], [40], [3]])
    found = length_lambda(mask, alpha=0.05)
    assert found.tolist() == pytest.approx([0.9, 0.5, 0.0])
    rewards = torch.randn(3, 200, dtype=torch.float64)
    values = torch.randn(3, 200, dtype=torch.float64)
    together = gae(rewards, values, mask, gamma=0.9, gae_lambda=found)
    for row, one in enumerate(found.tolist()):
        rows = slice(row, row + 1)
        alone = gae(rewards[rows], values[rows], mask[rows], gamma=0.9, gae_lambda=one)
        torch.testing.assert_close(together[0][rows], alone[0])
