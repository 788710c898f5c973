"""Policies, reward models and adapters of pretrained models, as others read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.config.model import LoraConfig, PretrainedConfig
from common.errors import CheckpointError
from common.models.adapter_files import (
    Adapter,
    adapter_of,
    export_merged,
    load_peft,
    load_scalar,
    put_adapter,
)
from common.models.adapters import adapter_tensors, attach_adapter, base_fingerprint
from common.models.build import build_decoder, build_policy, build_scalar
from common.models.decoder import DECODER
from common.models.networks import PolicyNetwork
from common.models.pretrained.checkpoint import SCORE, WEIGHTS
from common.models.weight_files import (
    load_weights,
    policy_folder,
    save_policy,
    save_scalar,
)
from tests.common.models.pretrained.checkpoints import SETTINGS, random_checkpoint

FAMILIES = sorted(SETTINGS)
TOKENS = torch.randint(0, 250, (3, 17), generator=torch.Generator().manual_seed(0))


def shape_of(path: Path) -> PretrainedConfig:
    return PretrainedConfig(start=str(path), context=32)


def policy_of(path: Path) -> PolicyNetwork:
    network = build_policy(shape_of(path))
    network.value.initialise(3)
    load_weights(network, path)
    return network.eval()


def reference(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_that_was_not_trained_is_the_checkpoint(family: str, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    network = policy_of(path)
    with policy_folder(tmp_path / "policy", path) as folder:
        save_policy(network.state_dict(), folder, shape_of(path), path)
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "policy" / file.name).read_bytes() == file.read_bytes(), file
    before, after = load_file(path / WEIGHTS), load_file(tmp_path / "policy" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_policy_computes_the_same_elsewhere(family: str, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", family)
    network = policy_of(path)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        expected, values = network(TOKENS)
    with policy_folder(tmp_path / "policy", path) as folder:
        save_policy(network.state_dict(), folder, shape_of(path), path)
    got = logits(reference(tmp_path / "policy"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    again = policy_of(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS), (expected, values), rtol=0, atol=0)


def adapted(path: Path, lora: LoraConfig) -> tuple[PolicyNetwork, Adapter]:
    """A policy with a random adapter, and that adapter as a learner hands it over."""
    network = policy_of(path)
    base = base_fingerprint(network.state_dict())
    attach_adapter(network, "policy", lora, seed=0)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, tensor in adapter_tensors(network.decoder, "policy"):
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    return network, adapter_of(network.state_dict(), "policy", lora, base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", ["plain", "rank_stabilised"])
def test_peft_reads_our_adapters(family: str, scaling: Any, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", family)
    network, adapter = adapted(path, LoraConfig(rank=3, alpha=7, scaling=scaling))
    with policy_folder(tmp_path / "policy", path) as folder:
        export_merged(adapter, network.state_dict(), path, folder, shape_of(path))
    with torch.no_grad():
        expected, _ = network(TOKENS)
    merged = logits(reference(tmp_path / "policy"))
    beside = PeftModel.from_pretrained(reference(path), tmp_path / "policy" / "adapter").eval()
    assert float((merged - logits(reference(path))).abs().max()) > 0.1  # it does something
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(beside), expected, rtol=0, atol=1e-4)
    config = beside.peft_config["default"]
    assert config.task_type == "CAUSAL_LM"
    assert config.base_model_name_or_path == str(path)


def test_names_and_targets_are_those_of_peft(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    lora = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    network, adapter = adapted(path, lora)
    with policy_folder(tmp_path / "policy", path) as folder:
        export_merged(adapter, network.state_dict(), path, folder, shape_of(path))
    names = load_file(tmp_path / "policy" / "adapter" / "adapter_model.safetensors").keys()
    assert names == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for factor in "AB"
    }
    back = load_peft(tmp_path / "policy" / "adapter", build_decoder(shape_of(path)))
    assert back.base == adapter.base
    assert back.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(back.tensors[name], tensor, rtol=0, atol=0)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    other = random_checkpoint(tmp_path / "other", seed=5)
    network, adapter = adapted(path, LoraConfig(rank=2))
    with pytest.raises(CheckpointError, match=f"trained on base {adapter.base}, and this one is"):
        export_merged(adapter, network.state_dict(), other, tmp_path, shape_of(other))
    narrow = LoraConfig(rank=2, targets=("q_proj",))
    with pytest.raises(CheckpointError, match="absent"):
        put_adapter(
            build_decoder(shape_of(path)),
            "again",
            Adapter(settings=narrow, base="", tensors=adapter.tensors),
        )


# --------------------------------------------------------------------- reward models


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "phi", "falcon"])
def test_a_classifier_of_one_label_is_a_reward_model(family: str, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", family, labels=1)
    theirs = AutoModelForSequenceClassification.from_pretrained(path).eval()
    ours = build_scalar(shape_of(path))
    assert load_scalar(ours, path, ours.decoder, "reward") is None
    lengths = [17, 3, 11]
    with torch.no_grad():
        values_BT = ours.eval()(TOKENS, lengths_B=torch.tensor(lengths))
        for row, length in enumerate(lengths):
            expected = theirs(TOKENS[row : row + 1, :length], use_cache=False).logits[0, 0]
            torch.testing.assert_close(values_BT[row, length - 1], expected, rtol=0, atol=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "classes", labels=3)
    with pytest.raises(CheckpointError, match=r"a classifier of 3 labels, not a reward model"):
        load_weights(build_scalar(shape_of(path)), path)
    path = random_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="a language model, not a reward model"):
        load_weights(build_scalar(shape_of(path)), path)
    path = random_checkpoint(tmp_path / "one", labels=1)
    with pytest.raises(CheckpointError, match="a classifier, not a language model"):
        load_weights(build_policy(shape_of(path)), path)


@pytest.mark.parametrize("labels", [0, 1])
def test_a_trained_reward_model_is_read_again(labels: int, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", labels=labels)
    network = build_scalar(shape_of(path))
    if labels:
        load_weights(network, path)
    else:
        network.decoder.initialise(0)
        network.head.initialise(0)
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    if labels:  # a classifier has no output head
        for name in list(network.state_dict()):
            if name.startswith(f"{DECODER}.lm_head"):
                network.state_dict()[name].zero_()
    with policy_folder(tmp_path / "reward", path) as folder:
        save_scalar(network.state_dict(), folder, path)
    again = build_scalar(shape_of(tmp_path / "reward"))
    load_weights(again, tmp_path / "reward")
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    if labels:
        stored = load_file(tmp_path / "reward" / WEIGHTS)[SCORE]
        assert torch.equal(stored, network.head.weight)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        with torch.no_grad():
            raw = theirs(TOKENS[:1], use_cache=False).logits[0, 0]
            ours = network.eval()(TOKENS[:1])[0, -1] - network.head.bias[0] + network.head.offset[0]
        torch.testing.assert_close(ours, raw, rtol=0, atol=1e-5)
