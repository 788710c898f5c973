"""Adapters in training: on real gangs, under every ZeRO stage, with one base for two networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from common.config.run import RunConfig
from common.devices import compute_of
from common.errors import CheckpointError
from common.models.build import build_policy
from common.models.networks import PolicyNetwork, ScalarNetwork
from common.models.weight_files import load_weights
from common.wire.weights import state_hash
from learner.rank import LearnerRank
from learner.zero.engine import ZeroEngine
from tests.learner.test_sharding import close, preferences, sft_data
from tests.scored import trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
LORA = {"rank": 4, "alpha": 8.0}


class Rank(LearnerRank):
    """A learner's rank that tells what it holds."""

    def holds(self) -> dict[str, Any]:
        learner = self.learner
        assert learner.value is not None
        found: dict[str, Any] = {"state": 0, "trainable": 0, "frozen gradients": 0, "allocated": 0}
        for engine in (learner.policy, learner.value):
            self._count(engine, found)
        policy, value = learner.policy.network, learner.value.network
        assert isinstance(policy, PolicyNetwork)
        assert isinstance(value, ScalarNetwork)
        pairs = zip(policy.decoder.parameters(), value.decoder.parameters(), strict=True)
        found["one base"] = all(p is v for p, v in pairs if not p.requires_grad)
        return found

    def _count(self, engine: ZeroEngine, found: dict[str, Any]) -> None:
        for _, fragment in engine.fragments():
            size = int(np.prod(fragment.shape))
            found["trainable"] += size
            for kind in ("exp_avg", "exp_avg_sq"):
                held = min(fragment.tensors[kind].numel(), max(0, size - fragment.offset))
                found["state"] += held * fragment.tensors[kind].element_size()
        for state in engine.optimizer_state.optimizer.state.values():
            found["allocated"] += sum(t.nbytes for k, t in state.items() if k != "step")
        for parameter in engine.network.parameters():
            found["frozen gradients"] += not parameter.requires_grad and parameter.grad is not None


class Gang:
    """So many of them."""

    def __init__(self, ranks: int) -> None:
        remote = ray.remote(Rank).options(num_cpus=0.5)
        self.ranks = [remote.remote(rank, ranks, compute_of(cpus=1)) for rank in range(ranks)]
        self.every("connect", ray.get(self.ranks[0].listen.remote()))

    def every(self, method: str, *args: Any) -> list[Any]:
        return list(ray.get([getattr(rank, method).remote(*args) for rank in self.ranks]))

    def call(self, method: str, *args: Any) -> Any:
        return self.every(method, *args)[0]

    def begin(self, config: RunConfig) -> None:
        folder = config.run_dir
        reward = str(folder / "reward_model" / "reward.safetensors")
        self.call("begin_train", config, str(folder / "sft" / "policy.safetensors"), reward, (1,))

    def train(self, config: RunConfig, first: int = 0, count: int = 2) -> list[dict[str, float]]:
        metrics = []
        for iteration in range(first, first + count):
            made = trajectories(seed=iteration, adapter=config.train.adapter)
            tables = [ray.put(table) for table in made]
            metrics.append(self.call("policy_phase", iteration, None, *tables))
            if iteration == 0:
                metrics.append(self.call("auxiliary_phase", iteration))
        return metrics


@pytest.fixture(scope="module")
def gangs(cluster: None) -> Iterator[dict[int, Gang]]:
    made = {ranks: Gang(ranks) for ranks in (1, 2)}
    yield made
    for gang in made.values():
        for rank in gang.ranks:
            ray.kill(rank)


def variant(workspace: RunConfig, folder: Path, *, zero: int = 0, **learner: Any) -> RunConfig:
    made = run_copy(
        workspace,
        folder,
        learner={"zero_stage": zero, "micro_batch_tokens": 60, **learner},
        train={"lora": LORA, "lr": 3e-3, "stop_kl": None, "adam_eps": 1e-5},
    )
    return made


@pytest.fixture(scope="module")
def adapted(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A run whose reward model was trained as an adapter."""
    config = run_copy(
        workspace,
        tmp_path_factory.mktemp("adapted"),
        reward_model={"lora": LORA, "epochs": 6, "batch_size": 16, "lr": 1e-2},
    )
    data = preferences()
    gang = gangs[2]
    sft = str(config.run_dir / "sft" / "policy.safetensors")
    total = gang.call("begin_reward", config, data[40:], data[:40], [], sft, 0)
    gang.call("advance", total)
    assert gang.call("evaluate")["accuracy_heldout"] > 0.9
    gang.call("shift", sft_data(config, 30))
    gang.call("export_stage", str(config.run_dir / "reward_model"))
    made = load_file(config.run_dir / "reward_model" / "reward.safetensors")
    assert {name.split(".")[0] for name in made} == {"blocks", "head"}
    assert all("lora_" in name for name in made if name.startswith("blocks"))
    return config


def test_ranks_and_stages_agree_hold_one_base_and_only_what_is_trained(
    adapted: RunConfig, gangs: dict[int, Gang], tmp_path: Path
) -> None:
    cases = {"one": (1, 0), "two": (2, 0), "ZeRO 1": (2, 1), "ZeRO 2": (2, 2), "ZeRO 3": (2, 3)}
    expected: list[dict[str, float]] = []
    weights: dict[str, torch.Tensor] = {}
    for name, (ranks, zero) in cases.items():
        config = variant(adapted, tmp_path / name, zero=zero)
        gang = gangs[ranks]
        gang.begin(config)
        metrics = gang.train(config)
        assert metrics[1]["auxiliary/clone_kl_first"] == 0.0, "invariant I8"
        held = gang.every("holds")
        for rank in held:
            assert rank["one base"], "policy and value network share it"
            assert rank["frozen gradients"] == 0
        # Two moments of four bytes for each trained number and for nothing else.
        copies = ranks if zero == 0 else 1
        assert sum(rank["state"] for rank in held) == copies * 2 * 4 * held[0]["trainable"]
        padding = sum(rank["allocated"] - rank["state"] for rank in held)
        assert 0 <= padding < 0.02 * sum(rank["state"] for rank in held), (name, padding)
        gang.call("export_policy", str(config.run_dir / "policy"))
        made = load_file(config.run_dir / "policy" / "policy.safetensors")
        if not expected:
            expected, weights = metrics, made
        for ours, theirs in zip(metrics, expected, strict=True):
            for key in ("policy_loss", "value_loss", "kl", "auxiliary/value_loss", "score"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (name, key)
        close(made, weights, atol=2e-5)
    start = load_file(adapted.run_dir / "sft" / "policy.safetensors")
    for name in start:
        moved = float((weights[name] - start[name]).abs().max())
        frozen = any(part in name for part in ("norm", "embedding", "offset"))
        assert (moved == 0.0) if frozen else moved > 5e-5, name


@pytest.mark.parametrize("zero", [2, 3])
def test_in_bf16_two_networks_share_a_base_too(
    adapted: RunConfig, gangs: dict[int, Gang], tmp_path: Path, zero: int
) -> None:
    config = variant(adapted, tmp_path, zero=zero, precision="bf16")
    gang = gangs[2]
    gang.begin(config)
    metrics = gang.train(config)
    assert metrics[1]["auxiliary/clone_kl_first"] == 0.0
    assert all(rank["one base"] for rank in gang.every("holds"))
    gang.call("export_policy", str(config.run_dir / "policy"))
    made = load_file(config.run_dir / "policy" / "policy.safetensors")
    start = load_file(config.run_dir / "sft" / "policy.safetensors")
    assert torch.equal(made["palm.embedding.weight"], start["palm.embedding.weight"])


def test_a_whole_reward_model_gives_the_value_network_a_base_of_its_own(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path
) -> None:
    config = variant(workspace, tmp_path, zero=2)
    gangs[2].begin(config)
    gangs[2].train(config)
    assert not any(rank["one base"] for rank in gangs[2].every("holds"))


def test_whole_networks_can_start_from_a_reward_adapter(
    adapted: RunConfig, gangs: dict[int, Gang], tmp_path: Path
) -> None:
    config = run_copy(adapted, tmp_path, train={"lora": None})
    gangs[1].begin(config)
    assert gangs[1].train(config)[0]["value_loss"] > 0


@pytest.mark.parametrize("zero", [1, 3])
def test_checkpoints_hold_adapters_and_know_their_base(
    adapted: RunConfig, gangs: dict[int, Gang], tmp_path: Path, zero: int
) -> None:
    config = variant(adapted, tmp_path / "run", zero=zero)
    gang, saved = gangs[2], tmp_path / "saved"
    gang.begin(config)
    gang.train(config)
    state = gang.call("save", str(saved))
    names = {key for path in saved.glob("policy/*.safetensors") for key in load_file(path)}
    assert {name.split("|")[0].rpartition(".")[2].split("_")[0] for name in names} == {
        "lora",
        "weight",
        "bias",
    }, "adapters and the auxiliary head"
    expected = gang.train(config, first=2)
    whole = gang.call("export_policy", str(tmp_path / "whole"))
    gang.begin(config)
    gang.call("load", str(saved), state)
    assert gang.train(config, first=2) == expected
    assert gang.call("export_policy", str(tmp_path / "again")) == whole
    # On another base.
    other = build_policy(config.model)
    load_weights(other, config.run_dir / "sft" / "policy.safetensors")
    assert state_hash(other.decoder.state_dict()) == state["base"]
    with pytest.raises(ray.exceptions.RayTaskError) as error:
        gang.call("load", str(saved), {**state, "base": "0123"})
    assert isinstance(error.value.cause, CheckpointError)
    assert f"on base 0123, and the supervised policy is {state['base']}" in str(error.value)


@pytest.mark.parametrize("zero", [0, 3])
def test_sft_adapts_a_policy_that_is_there(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path, zero: int
) -> None:
    start = str(workspace.run_dir / "sft" / "policy.safetensors")
    config = run_copy(
        workspace,
        tmp_path,
        learner={"zero_stage": zero},
        sft={"lora": LORA, "start": start, "lr": 0.02, "batch_tokens": 512, "epochs": 2},
    )
    data, gang = sft_data(config), gangs[2]
    total = gang.call("begin_sft", config, data[20:], data[:20])
    before = gang.call("evaluate")["heldout_loss"]
    gang.call("advance", total)
    assert gang.call("evaluate")["heldout_loss"] < before - 0.3
    gang.call("export_stage", str(tmp_path / "made"))
    plain, old = build_policy(config.model), build_policy(config.model)
    load_weights(plain, tmp_path / "made" / "policy.safetensors")
    load_weights(old, Path(start))
    assert torch.equal(plain.decoder.embedding.weight, old.decoder.embedding.weight)
    assert not torch.equal(
        plain.decoder.blocks[0].ff_out.weight, old.decoder.blocks[0].ff_out.weight
    )
    assert (tmp_path / "made" / "adapter" / "adapter_config.json").exists()
