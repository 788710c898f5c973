"""Whole runs with adapters: what holds for whole weights holds for them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file

from actors.rollout_actor import RolloutActor
from common.config.model import LoraConfig
from common.config.run import RunConfig
from common.models.adapter_files import adapter_of, save_adapter
from common.models.adapters import attach_adapter, base_fingerprint
from common.models.build import build_policy, build_scalar
from common.models.weight_files import load_decoder, load_weights
from common.wire.trajectory import RolloutRequest, to_table
from deploy.evaluation.sampling import policy_weights
from deploy.stages.replay import replay_run
from deploy.workers.calls import start_pair
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import Run, finish, prompts_of
from tests.deploy.control.test_recovery import arm
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
LORA = {"rank": 4}


@pytest.fixture(scope="module")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    made = LearnerGang(workspace, "lora-tests")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def adapted(workspace: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A recipe with adapters on policy and value network, and a reward model that is one."""
    train = {"lora": LORA, "lr": 1e-2, "checkpoint_every": 1}
    config = run_copy(workspace, tmp_path_factory.mktemp("adapted"), train=train)
    reward = build_scalar(config.model)
    load_decoder(reward.decoder, config.run_dir / "sft" / "policy.safetensors")
    reward.head.initialise(2)
    base = base_fingerprint(reward.state_dict())
    settings = LoraConfig(rank=2)
    attach_adapter(reward, "reward", settings, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in reward.named_parameters():
            if "lora_reward_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    state = reward.state_dict()
    head = {k: v for k, v in state.items() if k.startswith("head.")}
    path = config.run_dir / "reward_model" / "reward.safetensors"
    save_adapter(adapter_of(state, "reward", settings, base), head, path, config.model)
    return config


@pytest.fixture(scope="module")
def reference(
    adapted: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    config = run_copy(adapted, tmp_path_factory.mktemp("reference"))
    return config, finish(config, gang)


def test_what_is_sampled_is_what_is_trained(reference: tuple[RunConfig, dict[str, Any]]) -> None:
    """Invariant I1 through publishing, merging and the native forward, in every iteration."""
    config, facts = reference
    assert facts["rollouts_trained"] == 64
    lines = [json.loads(x) for x in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["metrics"]["ratio_deviation"] < 1e-4 for line in lines)
    moved = [line["metrics"]["kl"] for line in lines]
    assert moved[0] == pytest.approx(0.0, abs=1e-4), "before the first step policy = reference"
    assert abs(moved[-1]) > 1e-3


def test_the_policy_is_left_as_plain_weights_and_as_an_adapter(
    reference: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, _ = reference
    folder = config.run_dir / "policy"
    made, start = build_policy(config.model), build_policy(config.model)
    load_weights(made, folder / "policy.safetensors")
    load_weights(start, config.run_dir / "sft" / "policy.safetensors")
    assert torch.equal(made.decoder.embedding.weight, start.decoder.embedding.weight)
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (folder / "policy.safetensors").stat().st_size
    (newest,) = sorted((config.run_dir / "checkpoints").iterdir())[-1:]
    names = {k for path in newest.glob("policy/*") for k in load_file(path)}
    assert not any("embedding" in name for name in names), "checkpoints hold no base"


def test_the_number_of_actors_changes_nothing(
    adapted: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = run_copy(adapted, tmp_path, rollout={"actors": 1})
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.chaos)])
def test_a_killed_rank_and_a_resumed_run_change_no_weight(
    adapted: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    zero: int,
) -> None:
    expected = reference[1]["weights_hash"]
    if zero == 3:  # sums the gradient's norm in another order
        whole = run_copy(adapted, tmp_path / "whole", learner={"zero_stage": zero})
        expected = finish(whole, gang)["weights_hash"]
    config = run_copy(adapted, tmp_path, learner={"zero_stage": zero})
    arm(gang, "step", 10)  # in the auxiliary phase
    first = finish(config, gang, stop_after=3)
    assert first["learner_restarts"] == 1
    second = finish(config, gang)
    assert second["weights_hash"] == expected
    assert second["rollouts_trained"] == second["rollouts_issued"] == 64


@pytest.mark.chaos
def test_an_asynchronous_run_can_be_replayed(
    adapted: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = run_copy(adapted, tmp_path, train={"max_staleness": 2})
    facts = finish(config, gang)
    found = replay_run(config, Console(file=io.StringIO()))
    assert found["replayed_hash"] == facts["weights_hash"]


def test_actors_take_the_supervised_policy_and_the_trained_one_as_adapters(
    reference: tuple[RunConfig, dict[str, Any]], gang: LearnerGang
) -> None:
    config, _ = reference
    paths = [config.run_dir / part / "policy.safetensors" for part in ("sft", "policy")]
    requests = [
        RolloutRequest(
            rollout_id=f"x-{i:06d}",
            group=i,
            prompt_uid="",
            prompt_text=prompt.text,
            prompt_ids=prompt.ids,
            seed=i,
            adapter=config.train.adapter,
        )
        for i, prompt in enumerate(prompts_of(config)[:8])
    ]
    found = []
    with Run(config, gang) as controller:
        worker = next(iter(controller.collector.rollout.workers.values())).handle
        for version, path in enumerate(paths):
            weights = policy_weights(config, path, version)
            table = to_table(requests, RolloutRequest)
            facts, rollouts = start_pair(
                worker, RolloutActor.generate, table, weights.manifest, *weights.payloads
            )
            assert ray.get(facts).weights_fingerprint == weights.manifest.fingerprint
            found.append(ray.get(rollouts)["response_ids"].to_pylist())
    assert found[0] != found[1]
