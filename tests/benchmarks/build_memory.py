"""Prints what a learner rank takes at its peak while its networks are built under ZeRO 3.

Beside its share of weights, gradients and states. ``python -m tests.benchmarks.build_memory``: more
than 400 million parameters, two and four ranks.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.config.recipe import load_config
from common.config.run import RunConfig
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner.rank import LearnerRank
from learner.supervised.examples import EncodedPair
from tests.benchmarks.measure import start_ray
from tests.benchmarks.role_memory import Peak

KEPT = 20
"""Bytes of a parameter over all ranks: weights, masters, gradients and two moments, all fp32."""
SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LAYERS = {"sft": 24, "train": 12}
"""Of each network: policy training has two."""
PAIR = EncodedPair(prompt=[5] * 32, response=[6] * 32)


def built(stage: str, config: RunConfig, start: str, rank: LearnerRank) -> tuple[int, float]:
    """Build a stage's networks in a rank; returns bytes and seconds that it took."""
    begin = time.perf_counter()
    with Peak() as peak:
        if stage == "sft":
            rank.begin_sft(config, [PAIR] * 64, [PAIR])
        else:
            rank.begin_train(config, start, None, [2])
    return peak.bytes - peak.before, time.perf_counter() - begin


def measured(stage: str, folder: Path, ranks: int) -> None:
    """Build a stage, and print what each rank took."""
    start = str(folder / stage)
    shape: Any = LlamaConfig(**SHAPE, num_hidden_layers=LAYERS[stage])
    model: Any = LlamaForCausalLM(shape)
    count = sum(p.numel() for p in model.parameters()) * (1 if stage == "sft" else 2)
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    model.to(torch.bfloat16).save_pretrained(start)
    del model
    overrides = [
        f"model.start={start}",
        f"model.vocab_size={SHAPE['vocab_size']}",
        "model.context=256",
        "learner.zero_stage=3",
        f"learner.ranks={ranks}",
        "sft.lora=null",
        "sft.batch_tokens=1024",
        "train.lora=null",
        "train.ppg=null",
        "train.algorithm=ppo",
    ]
    config = load_config(Path("deploy/recipes/instruct.yaml"), overrides)
    gang = LearnerGang(config, f"build-{stage}-{ranks}")
    share = KEPT * count / ranks
    build = partial(built, stage, config, start)
    for size, seconds in ray.get([start_function(rank, build) for rank in gang.ranks]):
        print(
            f"{stage}, {count / 1e6:,.0f}M parameters on {ranks} ranks: {size / 2**20:,.0f} MiB in "
            f"{seconds:.1f} s, {(size - layer) / share:.2f} shares of {share / 2**20:,.0f} MiB and "
            "one layer",
            flush=True,
        )
    gang.stop()


def main() -> None:
    start_ray(cpus=4)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (2, 4):
            for stage in LAYERS:
                measured(stage, Path(folder), ranks)
    ray.shutdown()


if __name__ == "__main__":
    main()
