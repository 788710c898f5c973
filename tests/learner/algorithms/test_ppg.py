"""The auxiliary phase's losses against the slow reference, and invariant I8's exact zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.ppg import auxiliary_value_loss, clone_kl, joint_loss
from tests import literal
from tests.learner.batch.ragged import EXAMPLES, Ragged, raggeds, same, widen

VOCABULARY = 6


def whole(old: Tensor, new: Tensor) -> Tensor:
    """The KL, of all of the vocabulary at once."""
    return clone_kl([(old, new)]).kl


def logits_pair(batch: Ragged, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    old = batch.numbers(VOCABULARY, scale=2.0)
    return old, old + batch.numbers(VOCABULARY, scale=distance)


@EXAMPLES
@given(batch=raggeds())
def test_clone_kl_is_the_references(batch: Ragged) -> None:
    old, new = logits_pair(batch)
    nothing = torch.zeros(batch.mask_BR.shape)
    found = joint_loss(
        nothing, nothing, whole(old, new), batch.mask_BR, beta_clone=1.0, normalizer=7.0
    ).clone_kl
    expected = literal.clone_kl(old.tolist(), new.tolist(), batch.mask_BR.tolist(), 7.0)
    # In float32 at least: bf16 logits would lose it to rounding.
    assert found.dtype in (torch.float32, torch.float64)
    same(found.float(), expected, torch.float32)


def test_the_kl_is_from_the_old_policy_to_the_new() -> None:
    found = float(whole(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 0.0])))
    assert found == pytest.approx(literal.kl([0.0, 0.0], [3.0, 0.0]), rel=1e-5)
    assert abs(found - literal.kl([3.0, 0.0], [0.0, 0.0])) > 0.3, "the two must tell apart"


@EXAMPLES
@given(batch=raggeds(), distance=st.sampled_from([1e-3, 1.0, 30.0]), width=st.integers(1, 5))
def test_stretches_of_the_vocabulary_are_the_whole(
    batch: Ragged, distance: float, width: int
) -> None:
    old, new = (x[batch.mask_BR].double() for x in logits_pair(batch, distance))
    new.requires_grad_()
    stretches = list(zip(old.split(width, -1), new.split(width, -1), strict=True))
    found, expected = clone_kl(stretches), whole(old, new)
    torch.testing.assert_close(found.kl, expected, atol=1e-12, rtol=1e-9)
    (gradient,) = torch.autograd.grad(expected.sum(), [new])
    parts = [found.new.probabilities(n) - found.old.probabilities(o) for o, n in stretches]
    torch.testing.assert_close(torch.cat(parts, -1).detach(), gradient, atol=1e-12, rtol=1e-9)


def test_a_small_kl_of_large_logits_is_not_lost_in_their_rounding() -> None:
    """Logits of 30 are rounded by 2e-6 each: their normalizers' logarithms would be too."""
    generator = torch.Generator().manual_seed(0)
    old = 30 + 3 * torch.randn(100, 1000, generator=generator)
    new = old + 1e-3 * torch.randn(old.shape, generator=generator)
    exact = whole(old.double(), new.double())
    assert float(exact.mean()) < 1e-6
    assert float((whole(old, new) - exact).abs().max()) < 1e-6


@EXAMPLES
@given(batch=raggeds(), half=st.booleans())
def test_clone_kl_and_its_gradient_are_zero_at_equality(batch: Ragged, half: bool) -> None:
    old = torch.nan_to_num(batch.numbers(VOCABULARY, scale=3.0))
    old = old.bfloat16() if half else old
    new = old.clone().requires_grad_()
    found = whole(old, new)
    assert found.count_nonzero() == 0, "exactly (invariant I8)"
    (gradient,) = torch.autograd.grad(found.sum(), [new])
    # Probabilities add up to 1 only within float32's rounding.
    assert float(gradient.abs().max()) < 1e-6


@EXAMPLES
@given(batch=raggeds(), distance=st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
def test_clone_kl_is_never_negative(batch: Ragged, distance: float) -> None:
    old, new = logits_pair(batch, distance)
    found = whole(old, new)[batch.mask_BR]
    assert float(found.min()) >= -1e-6, "nothing below float32's rounding"


@EXAMPLES
@given(batch=raggeds())
def test_auxiliary_value_loss_is_the_references(batch: Ragged) -> None:
    v_aux, v_targ = batch.numbers(), batch.numbers()
    found = auxiliary_value_loss(v_aux, v_targ, batch.mask_BR, normalizer=5.0)
    mask = batch.mask_BR.tolist()
    expected = literal.auxiliary_value_loss(v_aux.tolist(), v_targ.tolist(), mask, 5.0)
    same(found, expected, batch.dtype)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float32), beta=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_joint_loss_adds_its_parts(batch: Ragged, beta: float) -> None:
    v_aux, v_targ, mask = batch.numbers(), batch.numbers(), batch.mask_BR
    old, new = logits_pair(batch)
    found = joint_loss(
        v_aux, v_targ, whole(old, new), mask, beta_clone=beta, normalizer=float(batch.tokens)
    )
    tokens = float(batch.tokens)
    value = literal.auxiliary_value_loss(v_aux.tolist(), v_targ.tolist(), mask.tolist(), tokens)
    kl = literal.clone_kl(old.tolist(), new.tolist(), mask.tolist(), tokens)
    same(found.aux_value, value, torch.float32)
    same(found.clone_kl, kl, torch.float32)
    same(found.total, value + beta * kl, torch.float32)


@EXAMPLES
@given(batch=raggeds(dtype=torch.float64), scale=st.sampled_from([2.0**-12, 2.0**12]))
def test_the_clone_kl_weighs_the_same_whatever_the_scores_scale(
    batch: Ragged, scale: float
) -> None:
    v_aux, v_targ, mask = batch.numbers(), batch.numbers(), batch.mask_BR
    old, new = logits_pair(batch)
    settings = {"beta_clone": 0.5, "normalizer": 3.0}
    kl = whole(old, new)
    plain = joint_loss(v_aux, v_targ, kl, mask, **settings, value_unit=0.8)
    other = joint_loss(
        v_aux * scale + 50.0,
        v_targ * scale + 50.0,
        kl,
        mask,
        **settings,
        value_unit=0.8 * scale,
    )
    same(other.total.float(), float(plain.total), torch.float32)
    same(other.aux_value / scale**2, float(plain.aux_value), torch.float64)


def test_joint_loss_trains_head_and_policy_and_reports_detached_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    v_aux = torch.randn(2, 3, generator=generator, requires_grad=True)
    new = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    old, v_targ = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, generator=generator)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = joint_loss(v_aux, v_targ, whole(old, new), mask, beta_clone=2.0, normalizer=3.0)
    assert not found.aux_value.requires_grad
    assert not found.clone_kl.requires_grad
    value_gradient, policy_gradient = torch.autograd.grad(found.total, [v_aux, new])
    expected = ((v_aux - v_targ) / 3.0).masked_fill(~mask, 0.0)
    torch.testing.assert_close(value_gradient, expected.detach())
    # d KL(p || q) / d logits = q - p.
    drift = 2.0 * (new.softmax(-1) - old.softmax(-1)) / 3.0
    torch.testing.assert_close(policy_gradient, drift.masked_fill(~mask[..., None], 0.0).detach())


@EXAMPLES
@given(batch=raggeds(dtype=torch.float32), columns=st.integers(0, 3))
def test_micro_batches_and_padding_change_nothing(batch: Ragged, columns: int) -> None:
    old, new = logits_pair(batch)
    case = [batch.numbers(), batch.numbers(), whole(old, new), batch.mask_BR]
    total = float(batch.tokens)
    together = joint_loss(*case, beta_clone=1.0, normalizer=total)
    parts = [
        joint_loss(*(widen(x[b : b + 1], columns) for x in case), beta_clone=1.0, normalizer=total)
        for b in range(len(batch.mask_BR))
    ]
    for name in ("total", "aux_value", "clone_kl"):
        added = math.fsum(float(getattr(part, name)) for part in parts)
        assert added == pytest.approx(float(getattr(together, name)), rel=1e-5, abs=1e-6), name
