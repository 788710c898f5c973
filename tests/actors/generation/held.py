"""Prints what a generator takes of memory while it holds versions of weights and samples from them.

``python -m tests.actors.generation.held TOKENIZER FOLDER``; the folder is for the weights' bytes.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from actors.generation.decoder_generator import DecoderGenerator
from actors.rollout_actor import RolloutActor
from common.config.model import PalmConfig
from common.config.workers import RolloutConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.devices import compute_of
from common.models.palm import PaLM
from common.out_of_memory import return_freed
from common.wire.trajectory import RolloutRequest, to_table
from common.wire.weights import Manifest, Payload, manifest_of
from tests.benchmarks.role_memory import Peak, anonymous

LARGE = PalmConfig(vocab_size=8192, dim=768, layers=20, heads=8, head_dim=64, context=2048)
SMALL = PalmConfig(vocab_size=100, dim=64, layers=1, heads=1, head_dim=64, context=64)
ROLLOUT = RolloutConfig(
    precision="bf16",
    max_response_tokens=32,
    slots=32,
    lease_size=32,
    prefill_tokens=512,
    kernels="native",
)


def published(model: PalmConfig, seed: int, folder: Path) -> tuple[Manifest, list[Payload]]:
    """Weights as they come: bytes that are not this process's."""
    palm = PaLM(model)
    palm.initialise(seed)
    manifest, (data,) = manifest_of(dict(palm.named_parameters()), seed, torch.bfloat16)
    path = folder / f"{seed}-{model.dim}.bin"
    data.tofile(path)
    return manifest, [Payload([np.memmap(path, dtype=np.uint8, mode="r")])]


def lease(longest: int) -> pa.Table:
    """Four groups of eight samples."""
    drawn = np.random.default_rng(0)
    prompts = [
        EncodedPrompt(uid=f"{i}", text="", ids=drawn.integers(2, 100, longest).tolist())
        for i in range(4)
    ]
    return to_table(evaluation_requests(prompts, seed=0, label="t", samples=8), RolloutRequest)


def actor(model: PalmConfig, tokenizer: str) -> RolloutActor:
    build = partial(DecoderGenerator, model, tokenizer, ROLLOUT, None)
    return RolloutActor("rollout-0", build, compute_of(cpus=1, threads=2, frugal=True))


def main(tokenizer: str, folder: str) -> None:
    versions = [published(LARGE, seed, Path(folder)) for seed in (1, 2)]
    small, few = actor(SMALL, tokenizer), lease(20)
    manifest, payloads = published(SMALL, 0, Path(folder))
    small.generate(few, manifest, *payloads)  # what code itself takes
    del small
    gc.collect()
    return_freed()
    before = anonymous()
    made, asked = actor(LARGE, tokenizer), lease(1000)
    with Peak() as peak:
        for manifest, payloads in versions:
            made.generate(asked, manifest, *payloads)
    generator = made.generator
    assert isinstance(generator, DecoderGenerator)
    memory = generator.engine.cached.implementation.memory()
    parameters = sum(parameter.numel() for parameter in PaLM(LARGE).parameters())
    print(json.dumps({"taken": peak.bytes - before, "parameters": parameters, **memory}))


if __name__ == "__main__":
    main(*sys.argv[1:])
