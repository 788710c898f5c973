"""The auxiliary loss in pieces of the logits: the numbers of the whole, and no logits in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.batching import sequence_batch
from common.config.model import ModelConfig, PalmConfig, PretrainedConfig
from common.models.build import build_policy
from common.models.embedding import HeadRows, output_head
from common.models.networks import PolicyNetwork, compute_in
from learner.batch.shards import MicroBatch
from learner.objectives.auxiliary import FrozenPolicy, JointObjective
from learner.optimisation import Whole
from learner.zero.engine import ZeroEngine
from tests.common.models.pretrained.tiny import reference, saved

VOCABULARY = 4000
WHOLE = Whole(tokens=7.0, sequences=2.0)
PROMPTS, RESPONSES = [[3, 4, 5], [6]], [[7, 8, 9, 10, 11], [12, 13]]
POSITIONS = 7
"""Of response tokens, which alone have logits."""


def palm(logits_mb: float, _: Path) -> ModelConfig:
    return PalmConfig(
        vocab_size=VOCABULARY, dim=8, layers=1, heads=1, head_dim=8, logits_mb=logits_mb
    )


def phi(logits_mb: float, folder: Path) -> ModelConfig:
    """With a head of its own, and a bias on it."""
    if not folder.exists():
        saved(reference("phi", vocab_size=VOCABULARY), folder)
    return PretrainedConfig(start=str(folder), context=32, logits_mb=logits_mb)


def gemma(logits_mb: float, folder: Path) -> ModelConfig:
    """With capped logits, and rows of its head that are no tokens."""
    if not folder.exists():
        saved(reference("gemma2", vocab_size=VOCABULARY + 500), folder)
    return PretrainedConfig(
        start=str(folder), context=32, logits_mb=logits_mb, vocab_size=VOCABULARY
    )


MODELS = [palm, phi, gemma]


def pair(model: ModelConfig, precision: str) -> tuple[PolicyNetwork, PolicyNetwork]:
    """A policy that has moved, and what it was before."""
    policy = build_policy(model)
    policy.initialise(0)
    old = copy.deepcopy(policy).eval().requires_grad_(False)
    for network in (policy, old):
        if precision == "bf16":
            compute_in(network, torch.bfloat16)
    return policy, old


def moved(policy: PolicyNetwork) -> PolicyNetwork:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise * parameter.abs().mean())
    return policy


def objective(policy: PolicyNetwork, old: PolicyNetwork) -> JointObjective:
    head: Any = output_head(old.decoder)
    bias = getattr(head, "bias", None)

    def rows() -> HeadRows:
        """Gathered as under ZeRO 3, in parts of which none is a multiple of a stretch."""
        for begin in range(0, len(head.weight), 1920):
            part = slice(begin, begin + 1920)
            yield head.weight[part], None if bias is None else bias[part]

    return JointObjective(
        engine=cast(ZeroEngine, policy),
        old=FrozenPolicy(run=old, head=rows),
        targets_NR=torch.arange(10.0).view(2, 5),
        value_unit=2.0,
        beta_clone=0.7,
    )


def micro() -> MicroBatch:
    data = sequence_batch(PROMPTS, RESPONSES)
    return MicroBatch(
        data=data,
        rows=[0, 1],
        real=True,
        last=True,
        response_BR=data.response_BR,
        mask_BR=data.response_mask_BR,
    )


class Largest(TorchDispatchMode):
    """Remembers of how many tokens any operation makes logits of all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.shape[:-1] == (POSITIONS,):
                self.tokens = max(self.tokens, leaf.shape[-1])
        return out


def literally(policy: PolicyNetwork, old: PolicyNetwork, made: MicroBatch) -> Tensor:
    """The loss by all logits of both at once, differentiated by PyTorch."""
    asked: Any = {
        "lengths_B": made.data.lengths_B,
        "prompts_B": made.data.prompts_B,
        "predict_BR": made.data.predict_BR,
    }
    logits, values = policy(made.data.tokens_BT, **asked)
    with torch.no_grad():
        old_logits, _ = old(made.data.tokens_BT, **asked)
    before, now = old_logits.log_softmax(-1), logits.log_softmax(-1)
    kl_BR = (before.exp() * (before - now)).sum(-1)
    off_BR = 0.5 * ((values - torch.arange(10.0).view(2, 5)) / 2.0).square()
    each_BR = off_BR + 0.7 * kl_BR
    return each_BR[made.mask_BR].sum() / WHOLE.tokens


@pytest.mark.parametrize("logits_mb", [1e3, 0.03])
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_and_its_gradient_are_those_of_whole_logits(
    model: Callable[..., ModelConfig], logits_mb: float, tmp_path: Path
) -> None:
    policy, old = pair(model(logits_mb, tmp_path / "model"), "fp32")
    moved(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    expected = literally(policy, old, micro())
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    found = objective(policy, old).loss(micro(), WHOLE).total
    ours = torch.autograd.grad(found, parameters, allow_unused=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("model", [palm, phi])
def test_pieces_are_the_whole(model: Callable[..., ModelConfig], tmp_path: Path) -> None:
    found: list[tuple[float, float, list[Tensor]]] = []
    rows = 2  # of a whole vocabulary, in the place of which all positions have some of it
    for logits_mb, most in ((1e3, 1920), (rows * 4 * VOCABULARY / 2**20, 1088)):
        policy, old = pair(model(logits_mb, tmp_path / "model"), "fp32")
        with Largest() as largest:
            loss = objective(moved(policy), old).loss(micro(), WHOLE)
            loss.total.backward()
        assert largest.tokens == most, "a stretch of the vocabulary, aligned"
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        found.append((float(loss.total.detach()), float(loss.sums["clone_kl"]), gradients))
    (whole, whole_kl, expected), (total, kl, gradients) = found
    assert whole_kl > 0.01, "the policies must differ for the comparison to mean much"
    assert total == pytest.approx(whole, abs=1e-6, rel=1e-6)
    assert kl == pytest.approx(whole_kl, abs=1e-6, rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_in_pieces_the_kl_to_itself_is_exactly_zero(
    model: Callable[..., ModelConfig], precision: str, tmp_path: Path
) -> None:
    for logits_mb in (1e3, 1e-6):
        policy, old = pair(model(logits_mb, tmp_path / "model"), precision)
        loss = objective(policy, old).loss(micro(), WHOLE)
        assert float(loss.sums["clone_kl"]) == 0.0, "invariant I8"
