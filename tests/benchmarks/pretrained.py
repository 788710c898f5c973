"""A pretrained model's shape against `transformers`: generation, and packed training rows.

The weights are random, which no product takes longer or shorter for. Both sides of a training step
compute the log-probabilities of the same tokens and their gradients by all weights; the library's
rows are padded, with a mask, as a loop over a data loader has them. A prompt of several responses,
which we compute once, is compared with the same rows computed apart by the same module.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from common.batching import SequenceBatch, sequence_batch
from common.config.model import PretrainedConfig
from common.logprobs import Sampling, chosen_reader
from common.models.build import build_policy
from common.models.networks import PolicyNetwork, compute_in
from tests.benchmarks.measure import Result, interleaved


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured, and how often."""

    shape: Mapping[str, Any]
    """Of a Llama."""
    batch: int
    """Prompts that are generated from at once."""
    prompt: int
    response: int
    lengths: tuple[int, ...]
    """Tokens of the sequences of a training step."""
    prompts: int
    """Prompts of a micro-batch in which each has several responses."""
    responses: tuple[int, ...]
    """Tokens of the responses to each of them; a prompt has `prompt`."""
    repeats: Mapping[str, int]


SMOLLM2 = Sizes(
    shape={
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
    batch=128,
    prompt=64,
    response=64,
    lengths=(40, 47, 54, 61, 68, 76, 84, 92, 101, 110, 120, 130, 142, 156, 171, 186),
    prompts=3,
    responses=(8, 14, 20, 26, 32, 38, 44, 50),
    repeats={"generation": 3, "llama": 2, "fp32": 2, "bf16": 3},
)
"""SmolLM2-135M's."""


def written(sizes: Sizes, folder: Path) -> Path:
    """Write a checkpoint of random weights."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes.shape), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def library(path: Path, dtype: torch.dtype) -> Any:
    """Load the library's own model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# ------------------------------------------------------------------ a training step


def rows(sizes: Sizes) -> SequenceBatch:
    """Sequences of mixed lengths; every token but the first is a response's."""
    made = [torch.randint(1, sizes.shape["vocab_size"], (n,)).tolist() for n in sizes.lengths]
    return sequence_batch([row[:1] for row in made], [row[1:] for row in made])


def packed_step(
    network: PolicyNetwork, batch: SequenceBatch, prompts_B: Tensor | None = None
) -> Tensor:
    """Sum log-probabilities as a policy phase reads them, and take gradients."""
    network.zero_grad()
    columns_BRC, _ = network(
        batch.tokens_BT,
        lengths_B=batch.lengths_B,
        prompts_B=prompts_B,
        predict_BR=batch.predict_BR,
        read=chosen_reader(batch.response_BR, Sampling()),
    )
    total: Tensor = columns_BRC[..., 0][batch.response_mask_BR].sum()
    total.backward()
    return total.detach()


def padded_step(model: Any, batch: SequenceBatch) -> Tensor:
    """The same by the library."""
    model.zero_grad()
    mask_BT = torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    logits = model(input_ids=batch.tokens_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1)
    chosen = logprobs.gather(-1, batch.response_BR[..., None]).squeeze(-1)
    total: Tensor = chosen[batch.response_mask_BR].sum()
    total.backward()
    return total.detach()


def policy(path: Path, precision: str) -> PolicyNetwork:
    """Build a policy as the learner does: fp32 weights, products in `precision`."""
    network = build_policy(PretrainedConfig(start=str(path)))
    network.initialise(0)
    if precision == "bf16":
        compute_in(network, torch.bfloat16)
    return network


def training(path: Path, sizes: Sizes, precision: str) -> Result:
    """Forward and backward of one micro-batch."""
    network = policy(path, precision)
    model = library(path, torch.bfloat16 if precision == "bf16" else torch.float32).train()
    batch = rows(sizes)
    runs = {
        "packed": lambda: packed_step(network, batch),
        "padded": lambda: padded_step(model, batch),
    }
    interleaved(runs, 1)
    took = interleaved(runs, sizes.repeats[precision])
    tokens, shortest, longest = sum(sizes.lengths), min(sizes.lengths), max(sizes.lengths)
    suffix = "" if precision == "fp32" else "_bf16"
    return Result(
        key=f"pretrained_step_vs_padded{suffix}",
        value=took["padded"] / took["packed"],
        metric=f"SmolLM2's shape: gradients of {len(sizes.lengths)} rows of {shortest} to "
        f"{longest}, {precision}",
        ours=f"{tokens / took['packed']:,.0f} tokens/s packed",
        baseline=f"{tokens / took['padded']:,.0f} transformers, padded, {precision} weights",
    )


def shared_prompts(path: Path, sizes: Sizes) -> Result:
    """Forward and backward of several responses to each prompt, in bf16."""
    network = policy(path, "bf16")
    vocabulary = sizes.shape["vocab_size"]
    prompts = torch.randint(1, vocabulary, (sizes.prompts, sizes.prompt)).tolist()
    responses = [torch.randint(1, vocabulary, (n,)).tolist() for n in sizes.responses]
    batch = sequence_batch(
        [prompt for prompt in prompts for _ in responses], responses * sizes.prompts
    )
    runs = {
        "shared": lambda: packed_step(network, batch, batch.prompts_B),
        "apart": lambda: packed_step(network, batch),
    }
    interleaved(runs, 1)
    took = interleaved(runs, sizes.repeats["bf16"])
    tokens = sum(sizes.responses) * sizes.prompts
    return Result(
        key="pretrained_shared_prompts_bf16",
        value=took["apart"] / took["shared"],
        metric=f"SmolLM2's shape: gradients of {len(responses)} responses to each of "
        f"{sizes.prompts} prompts of {sizes.prompt}, bf16",
        ours=f"{tokens / took['shared']:,.0f} response tokens/s, each prompt once",
        baseline=f"{tokens / took['apart']:,.0f} each prompt with each response",
    )


def run(sizes: Sizes = SMOLLM2) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        path = written(sizes, Path(folder) / "model")
        return [
            training(path, sizes, "fp32"),
            training(path, sizes, "bf16"),
            shared_prompts(path, sizes),
        ]
