"""Keys and values in blocks by need: the same samples in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.generation.engine import GenerationEngine
from actors.generation.interface import Generated
from actors.generation.native_forward import NativeForward
from common.config.model import PalmConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.errors import ConfigError
from common.logprobs import Sampling
from common.models.palm import PaLM
from common.native.model import BLOCK, block_bytes
from common.wire.trajectory import RolloutRequest

SHAPE = PalmConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=16, context=2048)
LONGEST = 40


def engine(dtype: torch.dtype = torch.float32, **more: Any) -> GenerationEngine:
    palm = PaLM(SHAPE)
    palm.initialise(0)
    sizes = {"slots": 12, "kernels": "native", "max_tokens": LONGEST, **more}
    palm.eval().requires_grad_(False).to(dtype)
    return GenerationEngine(palm, eos_ids=(1,), sampling=Sampling(), **sizes)


def asked(lengths: list[int], copies: int) -> list[RolloutRequest]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        EncodedPrompt(
            uid=f"p{i}", text="", ids=torch.randint(2, 53, (n,), generator=generator).tolist()
        )
        for i, n in enumerate(lengths)
    ]
    return evaluation_requests(prompts, seed=3, label="t", samples=copies)


def cache_of(engine: GenerationEngine) -> NativeForward:
    forward = engine.cached.implementation
    assert isinstance(forward, NativeForward)
    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_depend_on_neither_the_size_of_blocks_nor_the_room_in_the_cache(
    dtype: torch.dtype,
) -> None:
    requests = asked([3, 31, 64, 77, 200], copies=5)
    each = block_bytes(PaLM(SHAPE), dtype, 1) / 2**20  # MiB of a position
    seen: list[list[Generated]] = []
    peaks = []
    for block, positions, slots in ((32, None, 12), (16, 2100, 12), (64, 2048, 25), (2048, 0, 3)):
        mb = None if positions is None else each * max(positions, SHAPE.context)
        made = engine(dtype, block=block, cache_mb=mb, slots=slots)
        seen.append(made.generate(requests))
        peaks.append(made.cached.implementation.memory()["cache"] / 2**20 / each)
        assert cache_of(made)._blocks.free == len(cache_of(made)._blocks._users), "all came back"
    assert all(samples == seen[0] for samples in seen[1:])
    assert max(peaks[1:3]) <= 2112, "and no more was taken than there is"


def test_requests_wait_for_room_and_none_is_lost() -> None:
    """Eleven at once would fit into the slots, and four into the cache."""
    lengths = [400] * 11
    mb = block_bytes(PaLM(SHAPE), torch.float32, 2200) / 2**20
    made, at_once = engine(cache_mb=mb), []
    made.submit(asked(lengths, copies=1))
    found = []
    while not made.idle:
        found += made.step()
        at_once.append(len(made._slots))
    assert len(found) == 11
    assert max(at_once) == 2200 // BLOCK // -(-(400 + LONGEST) // BLOCK) == 4


def test_a_group_holds_its_prompt_once() -> None:
    """Eight samples of 1,000 tokens: the prompt's whole blocks, and what each adds to them."""
    made = engine()
    made.generate(asked([1000], copies=8))
    taken = made.cached.implementation.memory()["cache"] // block_bytes(PaLM(SHAPE), torch.float32)
    whole, last = divmod(1000, BLOCK)
    assert taken <= whole + 8 * -(-(last + LONGEST) // BLOCK)
    assert taken < 8 * 1000 / BLOCK / 5


def test_a_cache_that_holds_no_context_is_refused_and_one_that_does_never_stalls() -> None:
    each = block_bytes(PaLM(SHAPE), torch.float32, 1) / 2**20
    with pytest.raises(ConfigError, match="holds no sequence"):
        engine(cache_mb=each * (SHAPE.context - 1))
    made = engine(cache_mb=each * SHAPE.context, block=48)  # which does not divide the context
    found = made.generate(asked([SHAPE.context - LONGEST] * 3, copies=1))
    assert len(found) == 3


def test_the_distribution_changes_between_requests_and_not_beside_them() -> None:
    made, requests = engine(), asked([5, 9], copies=3)
    before = made.generate(requests)
    made.sample_by(Sampling(temperature=0.0))
    greedy = made.generate(requests)
    assert greedy[0].response_ids == greedy[1].response_ids != before[0].response_ids
    made.sample_by(Sampling())
    assert made.generate(requests) == before
    made.submit(requests)
    with pytest.raises(ValueError, match="while responses are being sampled"):
        made.sample_by(Sampling(temperature=0.0))
