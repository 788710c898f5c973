"""A pretrained model in training: SmolLM2's shape with few layers, over ranks and ZeRO stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.config.run import RunConfig
from common.models.build import build_policy
from common.models.weight_files import load_weights
from deploy.workers.gang import LearnerGang
from learner.supervised.examples import EncodedPair
from tests.common.models.pretrained.tiny import reference, saved
from tests.learner.test_sharding import preferences, sft_data
from tests.scored import trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 54,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
LORA = {"rank": 3, "alpha": 6.0, "targets": ["q_proj", "v_proj", "o_proj", "down_proj"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, and with rows for tokens that the tokenizer does not have."""
    return saved(reference("llama-tied", **SHAPE), tmp_path_factory.mktemp("checkpoint"))


def run_of(
    workspace: RunConfig,
    folder: Path,
    checkpoint: Path,
    *,
    zero: int = 0,
    budget: int = 60,
    **changes: Any,
) -> RunConfig:
    config = run_copy(
        workspace,
        folder,
        learner={"zero_stage": zero, "micro_batch_tokens": budget},
        reward_service={"components": {"length": {"kind": "function", "target": "a:b"}}},
    )
    (config.run_dir / "sft" / "policy.safetensors").unlink()
    values = config.model_dump(mode="json")
    values["train"] |= {"lr": 1e-3, "stop_kl": None, "adam_eps": 1e-5, **changes}
    model = {"start": str(checkpoint), "context": 64, "vocab_size": 300, "logits_mb": 0.01}
    return RunConfig.model_validate({**values, "model": model})


def trained(gang: LearnerGang, config: RunConfig) -> tuple[Path, list[Mapping[str, float]]]:
    """The exported policy after two policy phases and an auxiliary one, and metrics."""
    gang.begin_train(config)
    metrics: list[Mapping[str, float]] = []
    for iteration in range(2):
        made = trajectories(seed=iteration, adapter=config.train.adapter)
        tables = [ray.put(table) for table in made]
        metrics.append(gang.policy_phase(iteration, None, tables))
        if iteration == 0 and config.train.ppg is not None:
            metrics.append(gang.auxiliary_phase(iteration))
    gang.export_policy(config.run_dir / "policy")
    return config.run_dir / "policy", metrics


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
def test_ranks_and_zero_stages_agree(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    checkpoint: Path,
    tmp_path: Path,
    lora: dict[str, Any] | None,
) -> None:
    """Invariants I3 and I8; micro-batches of all rows, of a few and of one."""
    before = load_file(checkpoint / "model.safetensors")
    expected: dict[str, Tensor] = {}
    first: list[Mapping[str, float]] = []
    for ranks, zero, budget in ((1, 0, 4096), (2, 1, 60), (2, 2, 60), (2, 3, 1)):
        name = f"{ranks} ranks, ZeRO {zero}, micro-batches of {budget} tokens"
        config = run_of(workspace, tmp_path / name, checkpoint, zero=zero, budget=budget, lora=lora)
        policy, metrics = trained(gangs[ranks], config)
        weights = load_file(policy / "model.safetensors")
        assert weights.keys() == before.keys()
        if not expected:
            expected, first = weights, metrics
            changed = {k for k in before if not torch.equal(weights[k], before[k])}
            wanted = {k for k in before if not lora or any(t in k for t in lora["targets"])}
            assert changed == wanted
            # Rows of tokens that are none have no gradient; AdamW has no decay here.
            rows = weights["model.embed_tokens.weight"][300:]
            assert torch.equal(rows, before["model.embed_tokens.weight"][300:])
        assert metrics[1]["auxiliary/clone_kl_first"] == 0.0, "invariant I8"
        for ours, theirs in zip(metrics, first, strict=True):
            for key in ("policy_loss", "value_loss", "kl", "auxiliary/value_loss"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (name, key)
        for key in before:
            torch.testing.assert_close(weights[key], expected[key], atol=2e-5, rtol=1e-4, msg=key)


def test_what_is_exported_computes_in_the_library_what_the_learner_computes(
    workspace: RunConfig, gangs: dict[int, LearnerGang], checkpoint: Path, tmp_path: Path
) -> None:
    config = run_of(workspace, tmp_path, checkpoint, zero=2)
    policy, _ = trained(gangs[2], config)
    network = build_policy(config.model)
    load_weights(network, policy)
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    with torch.no_grad():
        ours, _ = network(tokens)
        theirs = model(tokens, use_cache=False).logits[..., :300]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_bit_for_bit(
    workspace: RunConfig, gangs: dict[int, LearnerGang], checkpoint: Path, tmp_path: Path
) -> None:
    hashes = []
    for stop in (False, True):
        config = run_of(workspace, tmp_path / str(stop), checkpoint, zero=2)
        gang = gangs[2]
        gang.begin_train(config)
        for iteration in range(2):
            tables = [ray.put(table) for table in trajectories(seed=iteration)]
            gang.policy_phase(iteration, None, tables)
            if stop and iteration == 0:
                base = gang.save(config.run_dir / "saved")
                gang.begin_train(config)
                gang.load(config.run_dir / "saved", base)
        hashes.append(gang.export_policy(config.run_dir / "policy"))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("zero", [2, 3])
def test_supervised_stages_learn(
    workspace: RunConfig, gangs: dict[int, LearnerGang], checkpoint: Path, tmp_path: Path, zero: int
) -> None:
    config = run_of(workspace, tmp_path, checkpoint, zero=zero)
    values = config.model_dump(mode="json")
    values["sft"] |= {"lr": 0.01, "batch_tokens": 512, "epochs": 2}
    values["reward_model"] |= {"lr": 3e-3, "epochs": 4, "batch_size": 16}
    config, gang = RunConfig.model_validate(values), gangs[2]
    data: list[EncodedPair] = sft_data(config)
    total = gang.begin_sft(config, data[20:], data[:20])
    before = gang.evaluate()["heldout_loss"]
    gang.advance(total)
    assert gang.evaluate()["heldout_loss"] < before - 0.5
    gang.export_stage(config.folder.sft.path)
    compared = preferences()
    total = gang.begin_reward(config, compared[40:], compared[:40], [], config.folder.sft.path, 0)
    gang.advance(total)
    assert gang.evaluate()["accuracy_heldout"] > 0.9
    gang.export_stage(config.folder.reward_model.path)
