"""The policy update on one DeepSpeed rank against a plain PyTorch loop, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import torch

from common.batching import micro_batches, sequence_batch
from common.config.stages import TrainConfig
from common.devices import compute_of
from common.logprobs import Sampling
from common.models.build import build_policy
from common.models.networks import PolicyNetwork
from learner.algorithms import ppo
from learner.batch.experience import Sequences
from learner.batch.shards import Shards
from learner.objectives.policy import PolicyObjective, PolicyTargets
from learner.optimisation import Plan, optimise
from learner.rank import LearnerRank
from learner.zero import process_group
from learner.zero.engine import ZeroEngine
from tests.benchmarks.measure import PROMPT, RESPONSE, SHAPE, THREADS, Result, interleaved

ROWS, BUDGET, REPEATS = 128, 4096, 5


def network() -> PolicyNetwork:
    made = build_policy(SHAPE)
    made.initialise(0)
    return made


def data() -> tuple[Sequences, PolicyTargets]:
    rng = np.random.default_rng(0)
    sequences = Sequences(
        prompts=rng.integers(2, SHAPE.vocab_size, (ROWS, PROMPT)).tolist(),
        responses=rng.integers(2, SHAPE.vocab_size, (ROWS, RESPONSE)).tolist(),
    )
    shape = (ROWS, RESPONSE)
    return sequences, PolicyTargets(
        proximal_NR=torch.full(shape, -8.0),
        advantages_NR=torch.from_numpy(rng.standard_normal(shape).astype(np.float32)),
    )


def policy_update(engine: ZeroEngine, sequences: Sequences, targets: PolicyTargets) -> None:
    """One epoch of one step, as a policy phase takes it."""
    settings = TrainConfig(minibatches=1, prompts_per_iteration=ROWS, stop_kl=None)
    objective = PolicyObjective(engine, targets, settings, Sampling(), RESPONSE)
    shards = Shards(seed=0, budget=BUDGET, device=engine.device)
    plan = Plan(phase="policy", iteration=0, epochs=1, minibatches=1, lr=1e-4)
    optimise(engine, objective, sequences, shards, plan)


def plain_step(
    net: PolicyNetwork,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    targets: PolicyTargets,
) -> None:
    """What one would write by hand: forward, PPO loss, backward, clip, AdamW."""
    rows = BUDGET // (PROMPT + RESPONSE)
    for at in range(0, ROWS, rows):
        some = list(range(at, min(ROWS, at + rows)))
        batch = sequence_batch(
            [sequences.prompts[i] for i in some], [sequences.responses[i] for i in some]
        )
        logits, _ = net(batch.tokens_BT, predict_BR=batch.predict_BR)
        logprobs = logits.log_softmax(-1).gather(-1, batch.response_BR[..., None]).squeeze(-1)
        ppo.policy_loss(
            logprobs,
            targets.proximal_NR[some],
            targets.advantages_NR[some],
            batch.response_mask_BR,
            clip_range=0.2,
            normalizer=float(ROWS * RESPONSE),
        ).loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def speed() -> list[Result]:
    rank = LearnerRank(0, 1, compute_of(cpus=1, threads=THREADS))
    rank.connect(rank.listen())
    sequences, targets = data()
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95))
    engines = {
        precision: ZeroEngine(
            network(),
            zero_stage=2,
            precision=precision,
            weight_decay=0.0,
            max_grad_norm=1.0,
            eps=1e-8,
        )
        for precision in ("fp32", "bf16")
    }
    runs = {
        "plain": lambda: plain_step(net, optimizer, sequences, targets),
        "fp32": lambda: policy_update(engines["fp32"], sequences, targets),
        "bf16": lambda: policy_update(engines["bf16"], sequences, targets),
    }
    interleaved(runs, 1)
    found = interleaved(runs, REPEATS)
    process_group.disconnect()
    tokens = ROWS * (PROMPT + RESPONSE)
    return [
        Result(
            key=f"learner_{precision}_vs_torch",
            value=found["plain"] / found[precision],
            metric=f"policy update, DeepSpeed ZeRO 2, {precision}",
            ours=f"{tokens / found[precision]:,.0f} tokens/s",
            baseline=f"{tokens / found['plain']:,.0f} plain PyTorch, fp32",
        )
        for precision in ("fp32", "bf16")
    ]


def padding() -> Result:
    lengths = np.random.default_rng(0).integers(8, 129, 512)
    groups = micro_batches(lengths.tolist(), 8192)
    padded = sum(len(group) * max(int(lengths[i]) for i in group) for group in groups)
    waste = 1 - lengths.sum() / padded
    unsorted = 1 - lengths.mean() / 128
    return Result(
        key="padding_waste",
        value=float(waste),
        metric="padding, 512 lengths of 8 to 128",
        ours=f"{waste:.1%} in {len(groups)} passes",
        baseline=f"{unsorted:.1%} one rectangle",
    )


def memory() -> Result:
    """Peak memory of log-probabilities at a large vocabulary, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.logprob_memory"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    share = found["peak"] / found["logits"]
    return Result(
        key="logprob_memory_share",
        value=share,
        metric="log-probabilities, 8,192 tokens, vocabulary 50,000",
        ours=f"{found['peak'] / 2**20:,.0f} MiB forward and backward",
        baseline=f"{found['logits'] / 2**20:,.0f} MiB fp32 logits",
    )


def run() -> list[Result]:
    return [*speed(), padding(), memory()]
