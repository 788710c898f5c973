"""bf16 where it costs nothing: norms, heads and sums of gradients are fp32, as float64 shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.model import LoraConfig, PalmConfig
from common.models.adapters import attach_adapter
from common.models.build import build_policy, build_scalar
from common.models.networks import PolicyNetwork, ScalarHead, compute_in
from common.models.palm import Norm, PaLM

SHAPE = PalmConfig(vocab_size=61, dim=32, layers=2, heads=2, head_dim=16, context=64)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def off(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_norm_is_summed_over_8192_tokens(dtype: torch.dtype) -> None:
    x, upstream = numbers(8192, 64).to(dtype), numbers(8192, 64, seed=1).to(dtype)
    norm = Norm(64).to(dtype)
    norm(x).backward(upstream)
    assert norm.weight.grad is not None
    exact = x.double()
    exact = (exact - exact.mean(1, keepdim=True)) / exact.var(1, correction=0, keepdim=True).sqrt()
    expected = (upstream.double() * exact).sum(0)
    # One rounding of the sum itself where the weight is bf16: at most 2^-8 of it.
    assert off(norm.weight.grad, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-4)


def test_a_head_in_bf16_tells_close_scores_apart() -> None:
    head = ScalarHead(128).to(torch.bfloat16)
    left = numbers(500, 128)
    # A tenth of what bf16 would still see beside 1.
    right = left + 4e-4 * numbers(500, 128, seed=1)
    with torch.no_grad():
        margins = head(left.float()) - head(right.float())
    weight = head.weight.detach().double()
    expected = ((left.float().double() - right.float().double()) @ weight.T).squeeze(-1)
    assert int((margins == 0).sum()) == 0
    torch.testing.assert_close(margins.double(), expected, atol=1e-6, rtol=1e-2)


def test_reward_models_in_bf16_see_margins_of_their_own_rounding() -> None:
    """Pairs that differ in their last token: no margin is lost to a head that rounds."""
    network = build_scalar(SHAPE)
    network.initialise(3)
    network.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (64, 2, 12), generator=generator)
    tokens[:, 1] = tokens[:, 0]
    tokens[:, 1, -1] = (tokens[:, 0, -1] + 1) % 61
    with torch.no_grad():
        values = network(tokens.flatten(0, 1))[:, -1].view(64, 2)
    assert values.dtype == torch.float32
    assert int((values[:, 0] == values[:, 1]).sum()) == 0
    # They are numbers of fp32, not of bf16 widened.
    assert int((values.bfloat16().float() == values).sum()) < 8


def gradients(network: PolicyNetwork, tokens: Tensor, *, rows: int) -> dict[str, Tensor]:
    """Of a loss summed over micro-batches of so many rows."""
    network.zero_grad()
    for part in tokens.split(rows):
        logits, values = network(part[:, :-1])
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        )
        ((nll + values.square().sum()) / tokens.numel()).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def rounded(lora: bool = False) -> PolicyNetwork:
    """A network that computes in bf16, with weights that bf16 holds exactly."""
    network = build_policy(SHAPE)
    network.initialise(3)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    if lora:
        attach_adapter(network, "policy", LoraConfig(rank=4, alpha=8.0), 0)
        for name, parameter in network.named_parameters():
            if "lora" in name:
                parameter.data = 0.1 * numbers(*parameter.shape).bfloat16().float()
    return network


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_fp32_and_near_the_exact_ones(lora: bool) -> None:
    """Stated bound: 2 % of each parameter's gradient, by 1 micro-batch or by 64."""
    tokens = torch.randint(0, 61, (64, 20), generator=torch.Generator().manual_seed(5))
    exact = gradients(rounded(lora).double(), tokens, rows=64)
    for rows in (64, 1):
        network = rounded(lora)
        compute_in(network, torch.bfloat16)
        found = gradients(network, tokens, rows=rows)
        assert found.keys() == exact.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32, name
            if name == "value.bias":  # summands of both signs, whose sum is almost nothing
                continue
            assert off(gradient, exact[name]) < 0.02, (name, rows, off(gradient, exact[name]))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_logits_in_pieces_sum_the_embeddings_gradient_in_fp32(kept: torch.dtype) -> None:
    def gradient(dtype: torch.dtype, **model: Any) -> Tensor:
        palm = PaLM(SHAPE.model_copy(update=model))
        palm.initialise(3)
        palm.to(torch.bfloat16).to(dtype)
        if dtype == torch.float32:
            compute_in(palm, torch.bfloat16)
        states = numbers(4096, 32).bfloat16().to(torch.float64 if dtype == torch.float64 else dtype)
        out = palm.read(states, lambda logits, part: logits.logsumexp(-1, keepdim=True))
        out.sum().backward()
        assert palm.embedding.weight.grad is not None
        return palm.embedding.weight.grad

    expected = gradient(torch.float64, logits_mb=1e6)
    # Pieces of one row: 4,096 summands.
    assert off(gradient(kept, logits_mb=1e-6), expected) < 4e-3


def test_what_is_frozen_is_kept_in_bf16_and_what_is_trained_in_fp32() -> None:
    network = rounded(lora=True)
    compute_in(network, torch.bfloat16)
    for name, parameter in network.named_parameters():
        product = not parameter.requires_grad and "norm" not in name
        assert parameter.dtype == (torch.bfloat16 if product else torch.float32), name


def test_rounding_at_use_and_rounding_for_good_are_the_same_function() -> None:
    """pi_old is kept rounded, the policy is rounded at use: their KL is exactly 0 (I8)."""
    tokens = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(5))
    trained, kept = build_policy(SHAPE), build_policy(SHAPE)
    trained.initialise(3)
    kept.load_state_dict(trained.state_dict())
    kept.requires_grad_(False)
    for network in (trained, kept):
        compute_in(network, torch.bfloat16)
    for ours, theirs in zip(trained(tokens), kept(tokens), strict=True):
        assert torch.equal(ours, theirs)
