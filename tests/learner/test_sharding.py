"""Invariant I3: results do not depend on ranks, micro-batch size or ZeRO stage. Real Ray gangs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.config.run import RunConfig
from common.wire.trajectory import ScoredTrajectory, from_table, to_table
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from learner.rank import LearnerRank
from learner.supervised.examples import EncodedComparison, EncodedPair
from learner.zero import frozen
from learner.zero.buckets import SMALL
from learner.zero.engine import ZeroEngine
from tests.scored import trajectories
from tests.workspaces import run_copy

COMPARED = (
    "policy_loss",
    "value_loss",
    "kl",
    "auxiliary/value_loss",
    "auxiliary/clone_kl",
    "score",
)
pytestmark = pytest.mark.usefixtures("cluster")


def train(
    gang: LearnerGang, config: RunConfig, iterations: int = 2
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights after policy phases and an auxiliary one after the first of them, and the metrics:
    what a loss does not reach must not step on what another loss left behind."""
    gang.begin_train(config)
    metrics = []
    for iteration in range(iterations):
        log = config.run_dir / f"{iteration}.parquet"
        tables = [ray.put(table) for table in trajectories(seed=iteration)]
        metrics.append(gang.policy_phase(iteration, log, tables))
        if config.train.ppg is not None and iteration == 0:
            metrics.append(gang.auxiliary_phase(iteration))
    gang.export_policy(config.run_dir / "policy")
    return load_file(config.run_dir / "policy" / "policy.safetensors"), metrics


def close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-4, msg=name)


def gather(little: bool, rank: LearnerRank) -> None:
    """Where it is little, this small head is sharded in frozen copies too, and read in parts."""
    sizes = (100, 2000) if little else (SMALL, 2**23)
    frozen.SMALL, frozen._GATHERED = sizes  # type: ignore[misc]


def variant(workspace: RunConfig, folder: Any, *, zero: int = 0, budget: int = 4096) -> RunConfig:
    return run_copy(
        workspace,
        folder,
        learner={"zero_stage": zero, "micro_batch_tokens": budget},
        # Adam divides by the gradient's own size: a large epsilon keeps last bits last bits.
        train={"lr": 1e-3, "stop_kl": None, "adam_eps": 1e-5},
    )


def test_ranks_micro_batches_and_zero_stages_agree(
    workspace: RunConfig, gangs: dict[int, LearnerGang], tmp_path: Any
) -> None:
    reference, metrics = train(gangs[1], variant(workspace, tmp_path / "base"))
    start = load_file(workspace.run_dir / "sft" / "policy.safetensors")
    moved = max(float((reference[k] - start[k]).abs().max()) for k in start if "value" not in k)
    assert moved > 1e-3, "training must have changed the weights for the comparison to mean much"
    cases = {
        "micro-batches of one row": (1, 0, 1),
        "two ranks": (2, 0, 4096),
        "two ranks, small micro-batches": (2, 0, 40),
        "ZeRO 1": (2, 1, 60),
        "ZeRO 2": (2, 2, 60),
        "ZeRO 3": (2, 3, 60),
        "ZeRO 2, logits in pieces": (2, 2, 4096),
        "ZeRO 3, logits in pieces": (2, 3, 4096),
        "ZeRO 2, activations made again": (2, 2, 4096),
        "ZeRO 3, activations made again": (2, 3, 4096),
    }
    for name, (ranks, zero, budget) in cases.items():
        config = variant(workspace, tmp_path / name.replace(" ", "-"), zero=zero, budget=budget)
        if "pieces" in name:
            model = config.model.model_copy(update={"logits_mb": 0.01})
            config = config.model_copy(update={"model": model})
        little = partial(gather, "pieces" in name)
        ray.get([start_function(rank, little) for rank in gangs[ranks].ranks])
        if "again" in name:
            model = config.model.model_copy(update={"activation_checkpointing": True})
            config = config.model_copy(update={"model": model})
        weights, found = train(gangs[ranks], config)
        for ours, theirs in zip(found, metrics, strict=True):
            for key in COMPARED:
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (name, key)
        close(weights, reference, atol=2e-5)
        assert found[1]["auxiliary/clone_kl_first"] == 0.0, "invariant I8"


def test_in_bf16_ranks_micro_batches_and_zero_stages_agree_within_what_products_round(
    workspace: RunConfig, gangs: dict[int, LearnerGang], tmp_path: Any
) -> None:
    """Stated bounds: half a percent of the gradient norm, 2 % of what the weights move."""

    def bf16(name: str, zero: int = 0, budget: int = 4096) -> RunConfig:
        config = variant(workspace, tmp_path / name, zero=zero, budget=budget)
        learner = config.learner.model_copy(update={"precision": "bf16"})
        return config.model_copy(update={"learner": learner})

    reference, metrics = train(gangs[1], bf16("base"))
    start = load_file(workspace.run_dir / "sft" / "policy.safetensors")
    moved = {name: float((reference[name] - start[name]).norm()) for name in start}
    cases = {
        "one row": (1, 0, 1),
        "two ranks": (2, 0, 4096),
        "ZeRO 1": (2, 1, 60),
        "ZeRO 2": (2, 2, 60),
        "ZeRO 3": (2, 3, 60),
    }
    for name, (ranks, zero, budget) in cases.items():
        weights, found = train(gangs[ranks], bf16(name, zero, budget))
        assert found[1]["auxiliary/clone_kl_first"] == 0.0, "invariant I8"
        for key in ("gradient_norm", "value_loss"):
            assert found[0][key] == pytest.approx(metrics[0][key], rel=5e-3), (name, key)
        for part in ("palm.embedding.weight", "palm.blocks.0.fused_in.weight", "palm.norm.weight"):
            apart = float((weights[part] - reference[part]).norm())
            assert apart < 0.02 * moved[part], (name, part)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce_pp"])
def test_critic_free_algorithms_agree_over_ranks(
    workspace: RunConfig, gangs: dict[int, LearnerGang], tmp_path: Any, algorithm: str
) -> None:
    found = []
    for ranks in (1, 2):
        config = run_copy(
            workspace,
            tmp_path / str(ranks),
            learner={"zero_stage": 2},
            train={
                "algorithm": algorithm,
                "ppg": None,
                "samples_per_prompt": 2,
                "stop_kl": None,
                "adam_eps": 1e-5,
            },
        )
        found.append(train(gangs[ranks], config, iterations=1)[0])
    close(found[0], found[1], atol=2e-5)


@pytest.mark.parametrize(
    ("algorithm", "kept"),
    [("ppo", [5]), ("ppo", [0, 3, 20]), ("grpo", [2, 3]), ("reinforce_pp", [7])],
)
def test_rows_left_out_are_as_if_they_had_never_been(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    tmp_path: Any,
    algorithm: str,
    kept: list[int],
) -> None:
    """Even where fewer are left than there are ranks and minibatches; the log holds the rest."""
    train = {"algorithm": algorithm, "ppg": None, "samples_per_prompt": 2, "adam_eps": 1e-5}
    rows = [r for table in trajectories() for r in from_table(table, ScoredTrajectory)]
    left = to_table([rows[i] for i in kept], ScoredTrajectory)
    out = [row.rollout_id for i, row in enumerate(rows) if i not in kept]
    found = []
    for ranks, tables, without in ((1, [left], []), (2, trajectories(), out)):
        config = run_copy(workspace, tmp_path / str(ranks), train=train)
        gang = gangs[ranks]
        gang.begin_train(config)
        log = config.folder.trajectories(0)
        metrics = gang.policy_phase(0, log, tables, without=without, meanwhile=lambda: None)
        assert metrics["policy_steps"] == min(2, len(kept))
        assert read_log(config.run_dir, 0)[0].equals(left)
        gang.export_policy(config.run_dir / "policy")
        found.append(load_file(config.run_dir / "policy" / "policy.safetensors"))
    close(found[0], found[1], atol=2e-5)


def sft_data(config: RunConfig, count: int = 120) -> list[EncodedPair]:
    """Responses repeat their prompt's tokens: something to learn."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt = rng.integers(2, 60, rng.integers(2, 10)).tolist()
        made.append(EncodedPair(prompt=prompt, response=[*prompt[:4], 1]))
    return made


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.02), ("adafactor", 0.3)])
def test_sft_agrees_over_ranks_and_stages_and_learns(
    workspace: RunConfig, gangs: dict[int, LearnerGang], tmp_path: Any, optimizer: str, lr: float
) -> None:
    data = sft_data(workspace)
    losses: list[float] = []
    weights: list[dict[str, Tensor]] = []
    for ranks, zero in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        config = run_copy(
            workspace,
            tmp_path / f"{ranks}-{zero}",
            learner={"zero_stage": zero},
            sft={"optimizer": optimizer, "lr": lr, "batch_tokens": 512, "epochs": 2},
        )
        gang = gangs[ranks]
        total = gang.begin_sft(config, data[20:], data[:20])
        before = gang.evaluate()["heldout_loss"]
        gang.advance(total)
        losses.append(gang.evaluate()["heldout_loss"])
        assert losses[-1] < before - 0.5
        folder = config.run_dir / "made"
        gang.export_stage(folder)
        weights.append(load_file(folder / "policy.safetensors"))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    for other in weights[1:]:
        close(weights[0], other, atol=1e-3)


def engines_alive(_: Any) -> int:
    return sum(isinstance(each, ZeroEngine) for each in gc.get_objects())


def test_the_stage_before_gives_its_memory_back(
    workspace: RunConfig, gangs: dict[int, LearnerGang]
) -> None:
    data, gang = sft_data(workspace), gangs[1]
    config = gang.config.model_copy(update={"sft": workspace.sft})
    for _ in range(2):
        gang.begin_sft(config, data[20:], data[:20])
        gang.advance(1)
        assert ray.get(gang.ranks[0].__ray_call__.remote(engines_alive)) == 1


def preferences(count: int = 160) -> list[EncodedComparison]:
    """Who begins with token 5 is preferred to who begins with 6."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        prompt, body = (rng.integers(10, 60, rng.integers(2, 9)).tolist() for _ in range(2))
        made.append(
            EncodedComparison(
                prompt=prompt, chosen=[5, *body, 1], rejected=[6, *body, 1], confidence=1.0
            )
        )
    return made


@pytest.mark.parametrize(
    ("zero", "kind"),
    [
        (2, {"lr": 3e-3}),
        (0, {"lr": 3e-3, "precision": "fp32"}),
        (0, {"lr": 0.05, "optimizer": "adafactor", "precision": "bf16"}),
        (3, {"lr": 0.05, "optimizer": "adafactor", "precision": "bf16"}),
    ],
)
def test_reward_model_learns_the_preference_and_is_centred(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    tmp_path: Any,
    zero: int,
    kind: dict[str, Any],
) -> None:
    data = preferences()
    settings = {"epochs": 4, "batch_size": 16, **kind}
    config = run_copy(workspace, tmp_path, reward_model=settings, learner={"zero_stage": zero})
    sft = config.run_dir / "sft" / "policy.safetensors"
    gang = gangs[2]
    # Nothing is chosen by these; ties are right neither way, and swapped sides are wrong.
    ties = [replace(c, confidence=0.5) for c in data[:5]]
    swapped = [replace(c, chosen=c.rejected, rejected=c.chosen) for c in data[:40]]
    total = gang.begin_reward(config, data[40:], data[:40], swapped + ties, sft, 0)
    trained = gang.advance(total)
    assert 0 < trained["gradient_norm"] < 100
    found = gang.evaluate()
    assert found["accuracy_heldout"] > 0.9
    assert found["accuracy_reported"] == pytest.approx(1 - found["accuracy_heldout"], abs=1e-6)
    reference: Sequence[EncodedPair] = sft_data(config, 30)
    assert gang.shift(reference)["reference_mean"] != 0.0
    assert gang.shift(reference)["reference_mean"] == pytest.approx(0.0, abs=1e-5)


def test_ranks_start_without_inductor(workspace: RunConfig, gangs: dict[int, LearnerGang]) -> None:
    """It takes a second to import; DeepSpeed would, for an optimizer that nobody asked for."""
    gangs[2].begin_train(workspace)
    for rank in gangs[2].ranks:
        assert not ray.get(rank.__ray_call__.remote(_has_inductor))


def _has_inductor(_: Any) -> bool:
    return "torch._inductor.compile_fx" in sys.modules
