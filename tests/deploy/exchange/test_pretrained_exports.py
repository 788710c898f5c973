"""A checkpoint through a real learner and out again, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.config.run import RunConfig
from common.errors import CheckpointError
from common.models.build import build_policy, build_scalar
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.writing import VALUE_HEAD
from common.models.weight_files import load_weights
from deploy.exchange.exporting import export_run
from deploy.run_folder import checkpoints
from tests.common.models.pretrained.checkpoints import SETTINGS, random_checkpoint
from tests.learner.test_lora_training import LORA, Gang, gangs
from tests.learner.test_sharding import preferences, sft_data
from tests.workspaces import run_copy

__all__ = ["gangs"]
pytestmark = pytest.mark.usefixtures("cluster")
TOKENS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def run_of(
    workspace: RunConfig, folder: Path, start: Path, *, zero: int, **sections: Any
) -> RunConfig:
    copied = run_copy(workspace, folder, learner={"zero_stage": zero, "micro_batch_tokens": 60})
    values = copied.model_dump(mode="json") | {"model": {"start": str(start), "context": 64}}
    for name, changes in sections.items():
        values[name] |= changes
    return RunConfig.model_validate(values)


def checkpoint(folder: Path, **options: Any) -> Path:
    return random_checkpoint(folder, settings={**SETTINGS["llama"], "vocab_size": 304}, **options)


def begin(gang: Gang, config: RunConfig, start: Path) -> None:
    gang.call("begin_train", config, str(start), None, [1])


def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("zero", "lora"), [(0, None), (1, LORA), (2, None), (3, None), (3, LORA)])
def test_without_a_step_a_checkpoint_comes_out_as_it_went_in(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path, zero: int, lora: Any
) -> None:
    start = checkpoint(tmp_path / "model", dtype=torch.bfloat16, max_shard_size="40KB")
    config = run_of(workspace, tmp_path / "runs", start, zero=zero, train={"lora": lora})
    begin(gangs[2], config, start)
    gangs[2].call("export_policy", str(tmp_path / "policy"))
    before, after = Checkpoint.open(start), Checkpoint.open(tmp_path / "policy")
    assert dict(before.config) == dict(after.config)
    stored, written = dict(before.tensors()), dict(after.tensors())
    assert stored.keys() == written.keys()
    for name, tensor in stored.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    for file in (*before.tokenizer_files, start / "generation_config.json"):
        assert (tmp_path / "policy" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(("zero", "lora"), [(0, None), (1, LORA), (3, LORA), (3, None)])
def test_what_was_trained_computes_the_same_in_transformers(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path, zero: int, lora: Any
) -> None:
    start, gang = checkpoint(tmp_path / "model"), gangs[2]
    train = {"lora": lora, "iterations": 4, "lr": 3e-3, "stop_kl": None}
    config = run_of(workspace, tmp_path / "runs", start, zero=zero, train=train)
    begin(gang, config, start)
    gang.train(config, first=1, count=1)

    def fill(where: Path) -> dict[str, Any]:
        learner = gang.call("save", str(where))
        return {"iteration": 2, "config": config.model_dump(mode="json"), "learner": learner}

    checkpoints.write(config.run_dir, 2, fill, keep=2)
    gang.call("export_policy", str(config.folder.policy.path))
    policy = config.folder.policy.path
    ours = build_policy(config.model)
    load_weights(ours, policy)
    with torch.no_grad():
        expected, _ = ours.eval()(TOKENS)
    torch.testing.assert_close(logits(policy), expected, rtol=0, atol=1e-5)
    assert float((expected - logits(start)).abs().max()) > 0.01
    if lora:
        torch.testing.assert_close(logits(start, policy / "adapter"), expected, rtol=0, atol=1e-5)
    export_run(config, tmp_path / "again", "2", "folder", None)
    for file in (*policy.glob("*.safetensors"), *policy.glob("adapter/*.safetensors")):
        again = load_file(tmp_path / "again" / file.relative_to(policy))
        for name, tensor in load_file(file).items():
            assert torch.equal(again[name], tensor), name
    export_run(config, tmp_path / "half", "latest", "merged", "bf16")
    half = Checkpoint.open(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert not (tmp_path / "half" / "adapter").exists()
    assert (tmp_path / "half" / VALUE_HEAD).exists()
    assert "iteration 2 of 4" in (tmp_path / "half" / "README.md").read_text()


def test_a_checkpoint_of_adapters_knows_its_base(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path
) -> None:
    start, other = checkpoint(tmp_path / "model"), checkpoint(tmp_path / "other", seed=9)
    config = run_of(workspace, tmp_path / "runs", start, zero=0, train={"lora": LORA})
    begin(gangs[1], config, start)
    state = gangs[1].call("save", str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match="trained on base"):
        moved = run_of(workspace, tmp_path / "moved", other, zero=0, train={"lora": LORA})
        checkpoints.write(
            moved.run_dir,
            1,
            lambda folder: {
                "iteration": 1,
                "learner": gangs[1].call("save", str(folder)),
            },
            keep=1,
        )
        export_run(moved, tmp_path / "out", "1", "folder", None)
    assert state["base"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora", [None, LORA])
def test_supervised_stages_leave_folders_that_the_next_one_takes(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path, lora: Any
) -> None:
    start, gang = checkpoint(tmp_path / "model"), gangs[2]
    stage = {"lr": 0.02, "batch_tokens": 512, "lora": lora}
    reward = {"lr": 1e-2, "batch_size": 16, "lora": lora}
    config = run_of(workspace, tmp_path / "runs", start, zero=2, sft=stage, reward_model=reward)
    data = sft_data(config)
    total = gang.call("begin_sft", config, data[20:], data[:20])
    before = gang.call("evaluate")["heldout_loss"]
    gang.call("advance", total)
    assert gang.call("evaluate")["heldout_loss"] < before
    sft = config.folder.sft.path
    gang.call("export_stage", str(sft))
    assert (sft / "adapter").exists() == bool(lora)
    assert float((logits(sft) - logits(start)).abs().max()) > 0.01
    pairs = preferences()
    gang.call("begin_reward", config, pairs, pairs[:8], [], str(sft), 0)
    gang.call("advance", 2)
    folder = config.folder.reward_model
    gang.call("export_stage", str(folder.path))
    weights = folder.weights if lora else folder.path
    assert weights.exists()
    assert (folder.path / "scalar_head.safetensors").exists() == (not lora)
    gang.call("begin_train", config, str(sft), str(weights), [1])
    if not lora:
        load_weights(build_scalar(config.model), folder.path)
