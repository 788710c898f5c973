"""Prints by how much an auxiliary phase's peak memory is above a policy phase's, under ZeRO 3.

Beside it stands what a rank's share of the frozen copy and two pieces of logits take.
``python -m tests.benchmarks.auxiliary_memory`` trains a model, of which a third is its output head,
on two ranks, in fp32 and in bf16; it takes six minutes.
"""

from __future__ import annotations

import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.config.recipe import load_config
from common.config.run import RunConfig
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner.rank import LearnerRank
from tests.benchmarks.measure import start_ray
from tests.benchmarks.role_memory import Peak, scored

RANKS, PIECE_MB, ROWS = 2, 8, 32
SHAPE: dict[str, Any] = {
    "vocab_size": 64_000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def phases(config: RunConfig, start: str, table: pa.Table, rank: LearnerRank) -> tuple[int, int]:
    """Bytes at the peak of a policy phase, and of an auxiliary one behind it.

    Both have been before: their moments are there.
    """
    rank.begin_train(config, start, None, [2])
    found = []
    for iteration in range(2):
        gc.collect()
        with Peak() as policy:
            rank.policy_phase(iteration, None, table)
        gc.collect()
        with Peak() as auxiliary:
            metrics = rank.auxiliary_phase(iteration)
        assert metrics["auxiliary/clone_kl_first"] == 0.0
        found = [policy.bytes, auxiliary.bytes]
    return found[0], found[1]


def measured(precision: str, start: str, count: int) -> None:
    """Train on ranks of their own, and print what each took."""
    overrides = [
        f"model.start={start}",
        f"model.vocab_size={SHAPE['vocab_size']}",
        "model.context=256",
        f"model.logits_mb={PIECE_MB}",
        "learner.zero_stage=3",
        f"learner.ranks={RANKS}",
        f"learner.precision={precision}",
        "learner.micro_batch_tokens=1024",
        "sft.lora=null",
        "train.lora=null",
        "train.algorithm=ppo",
        "train.ppg={n_pi: 1, e_aux: 1}",
        "train.minibatches=1",
    ]
    config = load_config(Path("deploy/recipes/instruct.yaml"), overrides)
    gang = LearnerGang(config, f"auxiliary-{precision}")
    size = 4 if precision == "fp32" else 2
    allowed = size * count / RANKS + 2 * PIECE_MB * 2**20
    run = partial(phases, config, start, scored(config, ROWS))
    for policy, auxiliary in ray.get([start_function(rank, run) for rank in gang.ranks]):
        print(
            f"{precision}, {count / 1e6:,.0f}M parameters on {RANKS} ranks: policy phase "
            f"{policy / 2**20:,.0f} MiB, auxiliary phase {(auxiliary - policy) / 2**20:+,.0f} MiB; "
            f"share of pi_old and two pieces: {allowed / 2**20:,.0f} MiB",
            flush=True,
        )
    gang.stop()


def main() -> None:
    start_ray(cpus=4)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
        count = sum(p.numel() for p in model.parameters())
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        for precision in ("fp32", "bf16"):
            measured(precision, folder, count)
    ray.shutdown()


if __name__ == "__main__":
    main()
