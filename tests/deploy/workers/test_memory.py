"""What a stage takes and whether it fits into this machine, by hand-counted bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from common import out_of_memory
from common.config.run import RunConfig
from common.errors import ClusterError
from common.models.pretrained.checkpoint import Checkpoint
from common.native.library import packed_itemsize
from deploy.workers.memory import needs, require_room
from learner.zero.buckets import BUCKET
from tests.common.models.pretrained.checkpoints import random_checkpoint

FUNCTION = {"components": {"length": {"kind": "function", "target": "a:b"}}}
ONE = {"ranks": 1, "zero_stage": 0}


def run_of(path: Path, **sections: Any) -> RunConfig:
    model = {"start": str(path), "context": 64}
    values = {"model": model, "learner": ONE, "reward_service": FUNCTION, **sections}
    return RunConfig.model_validate(values)


def parts(config: RunConfig, stage: str, role: int = 0) -> Mapping[str, float]:
    return needs(config, stage)[role].parts


GRPO = {"algorithm": "grpo", "samples_per_prompt": 2, "ppg": None}


def test_weights_and_optimizer_states_by_hand(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    size = Checkpoint.open(path).parameters
    states = "weights, gradients, moments"
    assert parts(run_of(path), "sft")[states] == 16 * size
    assert parts(run_of(path, train=GRPO), "train")[states] == 16 * size
    ppo = run_of(path, train={"ppg": None})
    assert parts(ppo, "train")[states] == 2 * 16 * size
    lora = run_of(path, sft={"lora": {"rank": 2}, "precision": "bf16"})
    assert 2 * size < parts(lora, "sft")[states] < 4 * size
    phased = run_of(path)
    extra = parts(phased, "train")["copies and auxiliary phase"]
    assert extra == 2 * 8 * size + 4 * size, "moments of its own, and the frozen policy"


def test_what_deepspeed_gathers_and_sends_counts_once(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    size, buffers = Checkpoint.open(path).parameters, "ZeRO buffers"
    for stage, expected in ((0, 4 * size), (1, 4 * size), (2, 4 * size), (3, 8 * size)):
        learner = {"ranks": 2, "zero_stage": stage}
        assert parts(run_of(path, learner=learner), "sft")[buffers] == expected
        # Policy and value network compute one after the other, but both keep their buckets.
        found = parts(run_of(path, learner=learner), "train")[buffers]
        assert found == expected + (4 * size if stage == 3 else 0)
    rounded = {"lora": {"rank": 2}, "precision": "bf16"}
    adapters = parts(run_of(path, sft=rounded, learner={"zero_stage": 3}), "sft")[buffers]
    assert 2 * size < adapters < 4 * size, "a base is gathered as it is kept"


def test_networks_are_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    facts = Checkpoint.open(path).facts.values()
    largest = max(math.prod(fact.shape) for fact in facts)
    learner = run_of(path).learner.model_copy(update={"ranks": 64, "gpus_per_rank": 1.0})
    beside = needs(run_of(path).model_copy(update={"learner": learner}), "train")[0].beside
    assert beside is not None
    assert beside["loading"] == 4 * largest
    for stage, buckets in ((1, 2), (2, 2), (3, 2)):
        there = learner.model_copy(update={"zero_stage": stage})
        found = needs(run_of(path).model_copy(update={"learner": there}), "train")[0].parts
        whole = 4 * Checkpoint.open(path).parameters if stage == 3 else 0
        assert found["ZeRO buffers"] == buckets * 4 * BUCKET + whole


def test_an_actor_holds_weights_keys_and_values_by_hand(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    size = Checkpoint.open(path).parameters
    rollout = {"actors": 3, "precision": "bf16", "lease_size": 4}
    config = run_of(path, train=GRPO, rollout=rollout)
    found = parts(config, "train", 1)
    assert needs(config, "train")[1].count == 3
    packed = packed_itemsize(torch.bfloat16) * size
    assert (found["weights"], found["packed weights"]) == (0, packed), "packed is the only copy"
    layers, kv_heads, head_dim, context = 2, 2, 8, 64
    assert found["keys and values"] == 4 * 2 * layers * kv_heads * head_dim * context * 2
    few = run_of(path, train=GRPO, rollout=rollout | {"cache_mb": 0.02})
    assert parts(few, "train", 1)["keys and values"] == 0.02 * 2**20
    adapters = run_of(path, train={**GRPO, "lora": {"rank": 2}}, rollout=rollout)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48  # q and o, k and v, the MLP's three
    # A new version is merged before the one that is held goes; native kernels merge as they pack,
    # and have the base beside.
    assert parts(adapters, "train", 1)["weights"] == 2 * size
    assert parts(adapters, "train", 1)["packed weights"] == packed
    torch_kernels = run_of(
        path, train={**GRPO, "lora": {"rank": 2}}, rollout=rollout | {"kernels": "torch"}
    )
    assert parts(torch_kernels, "train", 1)["weights"] == 2 * size + 2 * 2 * (2 * block)
    assert parts(torch_kernels, "train", 1)["packed weights"] == 0
    beside = run_of(
        path, train={**GRPO, "lora": {"rank": 2}}, rollout=rollout | {"lora": "unmerged"}
    )
    assert parts(beside, "train", 1)["weights"] == 2 * size
    assert parts(beside, "train", 1)["packed weights"] == 0


def test_a_reward_worker_has_an_adapter_s_base_as_often_as_kernels_pack_it(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    size = Checkpoint.open(path).parameters
    adapter = {"components": {"reward_model": {"kind": "model"}}}

    def weights(**service: Any) -> float:
        config = run_of(
            path,
            train=GRPO,
            reward_model={"lora": {"rank": 2}},
            reward_service={**adapter, **service},
        )
        return parts(config, "train", 2)["weights"]

    assert weights(kernels="torch") == 4 * size, "one base, for both"
    assert weights() == 2 * 4 * size, "packed for the reference, and with the adapter merged"
    assert weights(precision="bf16") == 2 * size, "PyTorch computes in bf16"
    assert weights(reference={"start": str(path), "context": 64}, kernels="torch") == 2 * 4 * size


def test_a_reward_worker_holds_the_models_of_its_own(tmp_path: Path) -> None:
    path, other = (random_checkpoint(tmp_path / name) for name in ("model", "other"))
    size = Checkpoint.open(path).parameters
    assert parts(run_of(path, train=GRPO), "train", 2)["weights"] == 4 * size
    judged = {"precision": "bf16", "reference": {"start": str(other), "context": 64}}
    own = run_of(path, train=GRPO, reward_service=judged, reward_model={"lora": None})
    assert parts(own, "train", 2)["weights"] == 2 * 2 * size, "reference and reward model"


def test_activations_follow_tokens_and_logits_their_pieces(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    few, many = (
        parts(run_of(path, learner={**ONE, "micro_batch_tokens": n}), "sft") for n in (100, 300)
    )
    assert many["activations"] == pytest.approx(3 * few["activations"])
    model = {"start": str(path), "context": 64, "logits_mb": 128.0}
    wide = parts(run_of(path, model=model), "sft")["logits"] - few["logits"]
    assert 3 * 64 * 2**20 <= wide <= 6 * 64 * 2**20


def test_a_stage_begins_where_all_of_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = run_of(random_checkpoint(tmp_path / "model"), rollout={"actors": 3})
    total = sum(need.count * need.each for need in needs(config, "train"))
    for free, fits in ((1.5 * total, True), (0.99 * total, False)):
        monkeypatch.setattr(out_of_memory, "available_bytes", lambda free=free: int(free))
        if fits:
            require_room(config, "train")
        else:
            with pytest.raises(ClusterError):
                require_room(config, "train")


def test_the_number_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = random_checkpoint(tmp_path / "model")
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda: 2**20)
    words = r"train \(learner .*, rollout actors .*, reward workers .* MiB\) takes .* and 1.0 MiB"
    with pytest.raises(ClusterError, match=words):
        require_room(run_of(path), "train")
    elsewhere = run_of(path, cluster={"address": "auto"})
    require_room(elsewhere, "train")  # its nodes' memory is not this machine's


def test_this_machine_says_how_much_is_free() -> None:
    free = out_of_memory.available_bytes()
    assert free is not None
    assert 2**20 < free < 2**50


def test_what_is_on_a_gpu_takes_none_of_the_node_s_memory(tmp_path: Path) -> None:
    here = run_of(random_checkpoint(tmp_path / "model"))
    gpus = {"rollout": "gpus_per_actor", "reward_service": "gpus_per_replica"}
    there = here.model_copy(
        update={
            section: getattr(here, section).model_copy(update={field: 1.0})
            for section, field in {**gpus, "learner": "gpus_per_rank"}.items()
        }
    )
    for before, after in zip(needs(here, "train"), needs(there, "train"), strict=True):
        assert before.beside is None
        assert before.here == before.each
        assert after.beside is not None
        more = {"checkpoint", "published"} if after.what == "learner ranks" else set()
        assert after.beside.keys() == {"loading", "process", *more}
        assert after.here == sum(after.beside.values())
        assert after.parts["CUDA"] > 0
        assert "of the node's memory" in str(after)
    learner = needs(there, "train")[0]
    assert learner.parts["logits"] > 5 * 2**30, "pieces of 1 GiB"
