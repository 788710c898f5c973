"""Generation from SmolLM2's shape: ours against vLLM and `transformers`, in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from actors.generation.engine import GenerationEngine
from common.config.model import PretrainedConfig
from common.config.workers import RewardServiceConfig
from common.logprobs import Sampling
from common.models.build import build_decoder
from common.models.networks import compute_in
from common.native.coverage import Kernels
from common.native.frozen import run_natively
from common.wire.trajectory import Rollout, RolloutRequest, extend
from reward_service.models import ReferencePolicy, frozen_pass
from tests.benchmarks.decode import generate, profile, requests
from tests.benchmarks.measure import (
    THREADS,
    Result,
    interleaved,
    product_rate,
    share_of_limit,
)
from tests.benchmarks.pretrained import SMOLLM2, Sizes, library, written
from tests.benchmarks.vllm_process import vllm

VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
SCORED_BY: tuple[Kernels, ...] = ("native", "torch")
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "HOME": str(Path.home()),
    "PATH": f"{VLLM.parent}:/usr/bin:/bin",
}
MISSING = "vLLM is not there, and is not compared with: `make vllm` installs it"
SHORTEST, LONGEST = 8, 256
"""Tokens of responses of mixed lengths."""


def engine(path: Path, sizes: Sizes) -> GenerationEngine:
    """Make a rollout actor's engine, which no token ends a response in."""
    config = PretrainedConfig(start=str(path), context=sizes.prompt + LONGEST)
    decoder = build_decoder(config)
    decoder.initialise(0)
    return GenerationEngine(
        decoder.eval().requires_grad_(False).to(torch.bfloat16),
        eos_ids=(),
        sampling=Sampling(),
        max_tokens=LONGEST,
        slots=sizes.batch,
    )


def frozen(path: Path, sizes: Sizes, kernels: Kernels) -> ReferencePolicy:
    """Make a reward worker's reference policy."""
    config = PretrainedConfig(start=str(path), context=sizes.prompt + LONGEST)
    made = ReferencePolicy(config, path, Sampling())
    compute_in(made.network, torch.bfloat16)
    run_natively(made.network, kernels)
    return made


def rollouts(sizes: Sizes, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """As many tokens to each prompt as are generated."""
    responses = torch.randint(1, sizes.shape["vocab_size"], (len(requests), sizes.response))
    return [
        extend(
            request,
            Rollout,
            response_ids=response,
            response_text="",
            behavior_logprobs=[0.0] * len(response),
            unfiltered_logprobs=None,
            finish_reason="length",
            policy_version=0,
            weights_fingerprint="",
            actor_id="",
        )
        for request, response in zip(requests, responses.tolist(), strict=True)
    ]


def operations(sizes: Sizes) -> float:
    """Floating-point operations of the products of one prompt and its response."""
    shape = sizes.shape
    width, head = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    block = 2.0 * width * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
    tokens = sizes.prompt + sizes.response - 1
    head_products = sizes.response * 2.0 * width * shape["vocab_size"]
    each: float = tokens * shape["num_hidden_layers"] * block + head_products
    return each


def run(sizes: Sizes = SMOLLM2, small: int = 32) -> tuple[list[Result], dict[str, float]]:
    """The results, and the seconds of one run by operation.

    Args:
        sizes: what is measured.
        small: prompts of the smaller batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measured(written(sizes, Path(folder) / "model"), sizes, small)


def _measured(path: Path, sizes: Sizes, small: int) -> tuple[list[Result], dict[str, float]]:
    ours, theirs = engine(path, sizes), library(path, torch.bfloat16).eval()
    prompts = torch.randint(1, sizes.shape["vocab_size"], (sizes.batch, sizes.prompt))
    asked, equal = requests(prompts), [sizes.response] * sizes.batch
    mixed = [
        round(SHORTEST + i * (LONGEST - SHORTEST) / (sizes.batch - 1)) for i in range(sizes.batch)
    ]
    scored, budget = rollouts(sizes, asked), RewardServiceConfig().micro_batch_tokens
    ready = {kernels: frozen(path, sizes, kernels) for kernels in SCORED_BY}
    runs: dict[str, Callable[[], object]] = {
        **{
            f"score {kernels}": partial(frozen_pass, scored, budget, None, reference)
            for kernels, reference in ready.items()
        },
        "large": lambda: ours.generate(asked, equal),
        "small": lambda: ours.generate(asked[:small], equal[:small]),
        "mixed": lambda: ours.generate(asked, mixed),
        "hf": lambda: generate(theirs, prompts, sizes.response),
    }
    with ExitStack() as stack:
        if VLLM.exists():
            other = stack.enter_context(
                vllm(
                    path,
                    sizes.batch,
                    sizes.prompt + LONGEST,
                    python=VLLM,
                    environment=ENVIRONMENT,
                )
            )
            other(asked, equal)  # what is compiled at its first use
            runs["vllm large"] = lambda: other(asked, equal)
            runs["vllm small"] = lambda: other(asked[:small], equal[:small])
            runs["vllm mixed"] = lambda: other(asked, mixed)
        runs["large"]()
        took = interleaved(runs, sizes.repeats["llama"])
        limit = product_rate(torch.bfloat16)
    count = {"large": sum(equal), "small": sum(equal[:small]), "mixed": sum(mixed)}
    count["hf"] = count["native"] = count["torch"] = count["large"]
    rate = {name: count[name.split()[-1]] / took[name] for name in took}
    found = [*_decoded(rate, sizes, small), *_scored(rate, sizes)]
    reached = operations(sizes) * sizes.batch / took["large"]
    metric = "SmolLM2's shape: decode, share of the matrix-product limit"
    found.append(share_of_limit("llama_decode_share_of_limit", metric, reached, limit))
    return found, profile(ours, asked)


def _decoded(rate: Mapping[str, float], sizes: Sizes, small: int) -> list[Result]:
    """Tokens per second of generation, against the others that ran."""
    title = f"SmolLM2's shape: decode, {{}} x ({sizes.prompt} + {sizes.response})"
    lengths = f"SmolLM2's shape: decode, {sizes.batch} responses of {SHORTEST} to {LONGEST} tokens"
    against = [
        ("llama_decode_vs_vllm", "large", "vllm large", title.format(sizes.batch)),
        ("llama_decode_small_vs_vllm", "small", "vllm small", title.format(small)),
        ("llama_mixed_vs_vllm", "mixed", "vllm mixed", lengths),
        ("llama_decode_vs_hf", "large", "hf", title.format(sizes.batch)),
    ]
    return [
        Result(
            key=key,
            value=rate[name] / rate[other],
            metric=metric,
            ours=f"{rate[name]:,.0f} tokens/s, bf16",
            baseline=f"{rate[other]:,.0f} "
            + ("transformers generate, bf16" if other == "hf" else "vLLM, compiled, bf16"),
        )
        for key, name, other, metric in against
        if other in rate
    ]


def _scored(rate: Mapping[str, float], sizes: Sizes) -> list[Result]:
    """Response tokens per second of frozen passes."""
    return [
        Result(
            key=key,
            value=rate["score native"] / rate[other],
            metric=f"SmolLM2's shape: log-probabilities of {sizes.batch} x ({sizes.prompt} + "
            f"{sizes.response})",
            ours=f"{rate['score native']:,.0f} response tokens/s, bf16",
            baseline=f"{rate[other]:,.0f} {what}",
        )
        for key, other, what in (
            ("llama_score_vs_decode", "large", "to sample them"),
            ("llama_score_vs_torch", "score torch", "the same in PyTorch, bf16"),
        )
    ]
