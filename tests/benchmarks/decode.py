"""Generation: our engine against `transformers` and palm-rlhf-pytorch at the same shape."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from palm_rlhf_pytorch import PaLM as OtherPaLM

from actors.generation.engine import GenerationEngine
from actors.generation.native_forward import NativeForward
from common.logprobs import Sampling
from common.models.palm import PaLM
from common.wire.trajectory import RolloutRequest
from tests.benchmarks.measure import (
    PROMPT,
    RESPONSE,
    SHAPE,
    Result,
    interleaved,
    product_rate,
    seconds,
    share_of_limit,
)

BATCH, MIXED, REPEATS = 128, 1024, 5


def requests(prompts: torch.Tensor) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            rollout_id=str(i),
            group=i,
            prompt_uid="",
            prompt_text="",
            prompt_ids=row.tolist(),
            seed=i,
        )
        for i, row in enumerate(prompts)
    ]


def engine(dtype: torch.dtype) -> GenerationEngine:
    palm = PaLM(SHAPE)
    palm.initialise(0)
    palm.eval().requires_grad_(False).to(dtype)
    # No token ends a response: all sides sample the same numbers of tokens.
    return GenerationEngine(
        palm, eos_ids=(SHAPE.vocab_size,), sampling=Sampling(), max_tokens=RESPONSE
    )


def their_model(dtype: torch.dtype) -> Any:
    """A model of the same shape in transformers: parallel blocks, one KV head, SwiGLU, tied."""
    from transformers import CohereConfig, CohereForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = CohereConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        intermediate_size=SHAPE.ff_mult * SHAPE.dim,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=1,
        max_position_embeddings=SHAPE.context,
        tie_word_embeddings=True,
        logit_scale=SHAPE.dim**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return CohereForCausalLM(config).eval().to(dtype)


def generate(model: Any, prompts: torch.Tensor, length: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    assert made.shape == (len(prompts), prompts.shape[1] + length)


def operations() -> float:
    """Floating-point operations of the products that a run computes."""
    inner, ff, kv = SHAPE.heads * SHAPE.head_dim, SHAPE.ff_mult * SHAPE.dim, 2 * SHAPE.head_dim
    block = 2.0 * SHAPE.dim * (inner + kv + 2 * ff + inner + ff)
    # Of a prompt's earlier tokens the last layer computes keys and values only.
    skipped = (PROMPT - 1) * (block - 2.0 * SHAPE.dim * kv)
    blocks = (PROMPT + RESPONSE - 1) * SHAPE.layers * block - skipped
    return BATCH * (blocks + RESPONSE * 2.0 * SHAPE.dim * SHAPE.vocab_size)


def profile(made: GenerationEngine, asked: list[RolloutRequest]) -> dict[str, float]:
    """Seconds of one run by what they were spent on."""
    native = made.cached.implementation
    assert isinstance(native, NativeForward)
    before, drawing = native.seconds(), 0.0
    plain = made.cached.draw

    def draw(*args: Any) -> Any:
        nonlocal drawing
        begin = time.perf_counter()
        found = plain(*args)
        drawing += time.perf_counter() - begin
        return found

    with mock.patch.object(made.cached, "draw", draw):
        total = seconds(lambda: made.generate(asked))
    spent = {name: took - before[name] for name, took in native.seconds().items()}
    named = {
        "products into a block, with SwiGLU": spent["inward"],
        "products out of a block": spent["outward"],
        "logits": spent["logits"],
        "attention, rotation, cache": spent["attention"],
        "embedding and norms": spent["norms"],
        "sampling": drawing,
    }
    return named | {"scheduling": total - sum(named.values())}


def run() -> tuple[list[Result], dict[str, float]]:
    """The results, and the seconds of one bf16 run by operation."""
    torch.manual_seed(0)
    prompts = torch.randint(1, SHAPE.vocab_size, (MIXED, PROMPT))
    asked = requests(prompts[:BATCH])
    ours, exact = engine(torch.bfloat16), engine(torch.float32)
    theirs = {t: their_model(t) for t in (torch.float32, torch.bfloat16)}
    took = interleaved(
        {
            "bf16": lambda: ours.generate(asked),
            "fp32": lambda: exact.generate(asked),
            "hf": lambda: generate(theirs[torch.float32], prompts[:BATCH], RESPONSE),
            "hf bf16": lambda: generate(theirs[torch.bfloat16], prompts[:BATCH], RESPONSE),
        },
        REPEATS,
    )
    # Products a second, of the machine and of a run, by what they compute in.
    limit = {"bf16": product_rate(torch.bfloat16), "fp32": product_rate(torch.float32)}
    rate = {name: operations() / took[name] for name in limit}
    spent = profile(ours, asked)
    return [
        *against_transformers(took, {name: f"{rate[name] / limit[name]:.0%}" for name in limit}),
        mixed_lengths(ours, theirs[torch.float32], prompts),
        against_palm_rlhf(ours, prompts[: BATCH // 2]),
        *shares(rate["bf16"], limit["bf16"], spent),
    ], spent


def against_transformers(took: Mapping[str, float], limit: Mapping[str, str]) -> list[Result]:
    """One batch of equal lengths, by the seconds that each took and ours' share of the limit."""
    rate = {name: BATCH * RESPONSE / seconds for name, seconds in took.items()}
    return [
        Result(
            key="decode_vs_hf",
            value=rate["bf16"] / rate["hf"],
            metric=f"decode, {BATCH} x ({PROMPT} + {RESPONSE}) tokens",
            ours=f"{rate['bf16']:,.0f} tokens/s",
            baseline=f"{rate['hf']:,.0f} transformers generate, its default fp32",
            limit=limit["bf16"],
        ),
        Result(
            key="decode_vs_hf_bf16",
            value=rate["bf16"] / rate["hf bf16"],
            metric="the same",
            ours=f"{rate['bf16']:,.0f} tokens/s",
            baseline=f"{rate['hf bf16']:,.0f} transformers generate, bf16",
        ),
        Result(
            key="decode_fp32_vs_hf",
            value=rate["fp32"] / rate["hf"],
            metric="the same, fp32 throughout",
            ours=f"{rate['fp32']:,.0f} tokens/s",
            baseline=f"{rate['hf']:,.0f} transformers generate, fp32",
            limit=limit["fp32"],
        ),
    ]


def mixed_lengths(ours: GenerationEngine, theirs: Any, prompts: torch.Tensor) -> Result:
    """Responses of 8 to 128 tokens: continuous batching against padded batches."""
    limits = torch.randint(8, 129, (MIXED,)).tolist()
    many = requests(prompts)

    def padded() -> None:
        for at in range(0, MIXED, BATCH):
            generate(theirs, prompts[at : at + BATCH], max(limits[at : at + BATCH]))

    took = interleaved({"ours": lambda: ours.generate(many, limits), "hf": padded}, 3)
    rate = {name: sum(limits) / seconds for name, seconds in took.items()}
    return Result(
        key="decode_mixed_vs_hf",
        value=rate["ours"] / rate["hf"],
        metric=f"decode, {MIXED} responses of 8 to 128 tokens",
        ours=f"{rate['ours']:,.0f} tokens/s",
        baseline=f"{rate['hf']:,.0f} transformers generate, batches of {BATCH}",
    )


def against_palm_rlhf(ours: GenerationEngine, prompts: torch.Tensor) -> Result:
    """The other PaLM has no cache: a run takes a minute."""
    asked = requests(prompts)
    other = OtherPaLM(
        num_tokens=SHAPE.vocab_size, dim=SHAPE.dim, depth=SHAPE.layers, heads=4, dim_head=64
    ).eval()
    took = interleaved(
        {
            "ours": lambda: ours.generate(asked),
            "theirs": lambda: other.generate(
                PROMPT + RESPONSE, prompts, use_tqdm=False, return_seq_without_prompt=True
            ),
        },
        2,
    )
    rate = {name: len(prompts) * RESPONSE / seconds for name, seconds in took.items()}
    return Result(
        key="decode_vs_palm_rlhf",
        value=rate["ours"] / rate["theirs"],
        metric=f"decode, batch {len(prompts)}",
        ours=f"{rate['ours']:,.0f} tokens/s",
        baseline=f"{rate['theirs']:,.0f} palm-rlhf-pytorch 0.8.0 generate",
    )


def shares(rate: float, limit: float, spent: Mapping[str, float]) -> list[Result]:
    """A bf16 run's share of the products that the machine can do, and sampling's of the run."""
    steps = sum(spent.values())
    return [
        share_of_limit(
            "decode_share_of_limit", "decode, share of the matrix-product limit", rate, limit
        ),
        Result(
            key="sampling_share",
            value=spent["sampling"] / steps,
            metric="sampling, share of a run",
            ours=f"{spent['sampling'] * 1e3:,.0f} ms",
            baseline=f"{steps * 1e3:,.0f} ms, all of the run",
        ),
    ]
