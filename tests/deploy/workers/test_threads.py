"""Threads and precision are settings of every role, and reach who computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.devices import compute_of
from deploy.sampler import Sampler
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from tests.workspaces import run_copy


@pytest.mark.parametrize(
    ("threads", "cpus", "expected"),
    [(None, 0.4, 1), (None, 1.0, 1), (None, 2.5, 2), (3, 0.4, 3), (1, 8.0, 1)],
)
def test_threads_are_the_whole_cores_reserved_unless_they_are_set(
    threads: int | None, cpus: float, expected: int
) -> None:
    compute = compute_of(threads=threads, cpus=cpus)
    assert (compute.threads, compute.device, compute.collectives) == (expected, "cpu", "gloo")


def test_the_reward_service_computes_as_precisely_as_the_learner_unless_told() -> None:
    def precision(*overrides: str) -> str:
        return load_config(None, overrides).reward_precision

    assert precision() == "fp32"
    assert precision("learner.precision=bf16") == "bf16"
    assert precision("learner.precision=bf16", "reward_service.precision=fp32") == "fp32"
    assert precision("reward_service.precision=bf16") == "bf16"


@pytest.fixture
def kept_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("kept_threads")
def test_sample_computes_with_the_threads_of_rollouts(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_copy(workspace, tmp_path, rollout={"threads": 3})
    assert len(Sampler(config, sft=True).responses(["open"], seed=0)) == 1
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("cluster")
def test_every_worker_has_the_threads_and_the_precision_it_was_told(
    workspace: RunConfig, tmp_path: Path
) -> None:
    # Functions of this test: one of its module's would import the tests' settings in the worker.
    def threads(_: Any) -> int:
        return torch.get_num_threads()

    def rounded(worker: Any) -> list[str]:
        networks = (worker.reference.network, worker.reward_model.network)
        return [str(network.decoder.embedding.weight.dtype) for network in networks]

    config = run_copy(
        workspace,
        tmp_path,
        learner={"threads": 2, "ranks": 1, "precision": "bf16"},
        rollout={"threads": 3, "actors": 1},
        reward_service={"threads": 4},
    )
    folder = config.run_dir
    tokenizer, sft = folder / "tokenizer.json", folder / "sft" / "policy.safetensors"
    reward = folder / "reward_model" / "reward.safetensors"
    gang = LearnerGang(config, "threads")
    pools = [
        rollout_pool(config, "threads", tokenizer, sft),
        reward_pool(config, "threads", tokenizer, sft, reward),
    ]
    try:
        (actor,), (worker,) = (list(pool.workers.values()) for pool in pools)
        for handle, expected in ((gang.ranks[0], 2), (actor.handle, 3), (worker.handle, 4)):
            assert ray.get(handle.__ray_call__.remote(threads)) == expected
        assert ray.get(worker.handle.__ray_call__.remote(rounded)) == ["torch.bfloat16"] * 2
    finally:
        gang.stop()
        for pool in pools:
            pool.stop()
