"""Checkpoint folders: what is read, what is refused and with which words, and what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from common.errors import CheckpointError, ConfigError
from common.models.pretrained.checkpoint import INDEX, WEIGHTS, Checkpoint
from common.models.pretrained.config_files import CONFIG
from common.models.pretrained.writing import VALUE_HEAD, write_like, written_whole
from tests.common.models.pretrained.checkpoints import SETTINGS, random_checkpoint

FAMILIES = sorted(SETTINGS)


def module_of(path: Path) -> Any:
    """The model as `transformers` loads it: the independent reference."""
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)


def change_config(path: Path, **changes: Any) -> None:
    file = path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", family)
    checkpoint = Checkpoint.open(path)
    reference = module_of(path)
    fresh = AutoModelForCausalLM.from_config(reference.config)
    checkpoint.load_into(fresh)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    assert checkpoint.family == family
    assert checkpoint.parameters == sum(p.numel() for p in reference.parameters())
    assert checkpoint.tied == reference.config.tie_word_embeddings
    assert not checkpoint.labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_again_is_equal_and_loads(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = random_checkpoint(tmp_path / "model", family, dtype=dtype, max_shard_size="20KB")
    checkpoint, target = Checkpoint.open(path), tmp_path / "again"
    head = {"weight": torch.ones(1, 32), "bias": torch.zeros(1), "offset": torch.zeros(1)}
    state = {name: tensor.float() for name, tensor in checkpoint.tensors()}
    with written_whole(target) as folder:
        write_like(checkpoint, state, folder, beside={VALUE_HEAD: head}, max_shard_bytes=30_000)
    again = Checkpoint.open(target)
    assert len(again.weight_files) > 2  # shards, and an index
    read, stored = dict(again.tensors()), dict(checkpoint.tensors())
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    for file in [*checkpoint.tokenizer_files, path / CONFIG, path / "generation_config.json"]:
        assert (target / file.name).read_bytes() == file.read_bytes(), file
    assert load_file(target / VALUE_HEAD).keys() == head.keys()
    tokens = torch.arange(12)[None]
    assert torch.equal(module_of(path)(tokens).logits, module_of(target)(tokens).logits)
    messages = [{"role": "user", "content": "Hello <|im_end|>"}]
    before, after = (AutoTokenizer.from_pretrained(p) for p in (path, target))
    assert before.apply_chat_template(messages) == after.apply_chat_template(messages)


def test_vllm_would_not_read_our_head(tmp_path: Path) -> None:
    """Without an index it reads every safetensors file of the folder."""
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path / "model"))
    (tmp_path / "again").mkdir()
    write_like(
        checkpoint,
        dict(checkpoint.tensors()),
        tmp_path / "again",
        beside={VALUE_HEAD: {"a": torch.ones(1)}},
    )
    index = json.loads((tmp_path / "again" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {WEIGHTS}


def test_a_number_type_that_is_asked_for_is_in_the_configuration_too(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path / "model"))
    (tmp_path / "again").mkdir()
    state = dict(checkpoint.tensors())
    write_like(checkpoint, state, tmp_path / "again", dtype=torch.bfloat16)
    again = Checkpoint.open(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    assert again.config["dtype"] == "bfloat16"
    for name, tensor in again.tensors():
        assert torch.equal(tensor, state[name].bfloat16())


def test_what_is_written_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with pytest.raises(RuntimeError), written_whole(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with written_whole(target) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert (target / "second").stat().st_mode & 0o666 == target.stat().st_mode & 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_names_of_older_checkpoints_are_read_and_kept(tmp_path: Path) -> None:
    """`transformers` 4 called the head of gpt_neox `embed_out`, and stored what is derived."""
    path = random_checkpoint(tmp_path / "model", "gpt_neox")
    state = load_file(path / WEIGHTS)
    if "lm_head.weight" in state:
        state["embed_out.weight"] = state.pop("lm_head.weight")
    state["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
    save_file(state, path / WEIGHTS, {"format": "pt"})
    checkpoint = Checkpoint.open(path)
    checkpoint.load_into(AutoModelForCausalLM.from_config(module_of(path).config))
    (tmp_path / "again").mkdir()
    write_like(checkpoint, dict(checkpoint.tensors()), tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert "embed_out.weight" in again
    assert "gpt_neox.layers.0.attention.bias" not in again
    assert "gpt_neox.layers.0.attention.dense.bias" in again


def test_a_tied_head_that_is_stored_is_kept_if_it_is_the_embedding(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", "qwen2")
    state = load_file(path / WEIGHTS)
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / WEIGHTS, {"format": "pt"})
    checkpoint = Checkpoint.open(path)
    checkpoint.load_into(AutoModelForCausalLM.from_config(module_of(path).config))
    (tmp_path / "again").mkdir()
    trained = {k: v + 1 for k, v in checkpoint.tensors() if k != "lm_head.weight"}
    write_like(checkpoint, trained, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert torch.equal(again["lm_head.weight"], again["model.embed_tokens.weight"])
    state["lm_head.weight"] += 1
    save_file(state, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from .*embed_tokens"):
        Checkpoint.open(path).load_into(AutoModelForCausalLM.from_config(module_of(path).config))


def test_a_classifier_says_how_many_labels_it_has(tmp_path: Path) -> None:
    for labels in (1, 3):
        path = random_checkpoint(tmp_path / f"model-{labels}", labels=labels)
        assert Checkpoint.open(path).labels == labels


# --------------------------------------------------------------------- refused


def sharded(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def no_config(path: Path) -> None:
    (path / CONFIG).unlink()


def torn_config(path: Path) -> None:
    (path / CONFIG).write_text('{"model_type"')


def torn_shard(path: Path) -> None:
    shard = sharded(path)[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def missing_shard(path: Path) -> None:
    sharded(path)[1].unlink()


def other_shard(path: Path) -> None:
    """The shard of a model of other sizes, whose tensors have other names."""
    save_file({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, sharded(path)[1])


def outside(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (path / INDEX).write_text(json.dumps(index))


def pickled(path: Path) -> None:
    for file in (path / INDEX, *sharded(path)):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02")


def no_weights(path: Path) -> None:
    pickled(path)
    (path / "pytorch_model.bin").unlink()


def packed(path: Path) -> None:
    shard = sharded(path)[0]
    state = load_file(shard)
    save_file({k: (v * 100).to(torch.int8) for k, v in state.items()}, shard)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "no config.json; a checkpoint's folder holds"),
        (torn_config, "config.json: not JSON"),
        (torn_shard, "model-00002-of-.*torn or not safetensors"),
        (missing_shard, "model-00002-of-.*this shard is missing"),
        (other_shard, "model-00002-of-.*a shard of another model"),
        (outside, "no weight_map from tensors to files beside it"),
        (pickled, "only as pytorch_model.bin.*pickled files are not read.*save_pretrained"),
        (no_weights, "neither model.safetensors nor model.safetensors.index.json"),
        (packed, "stored as I8; quantized weights cannot be trained"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = random_checkpoint(tmp_path / "model", max_shard_size="20KB")
    Checkpoint.open(path)
    damage(path)
    with pytest.raises(CheckpointError, match=words) as refused:
        Checkpoint.open(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'num_local_experts': mixtures of exp"),
        ({"model_type": "qwen3_moe"}, "mixtures of experts are not supported"),
        ({"model_type": "gemma3"}, "talipot import FOLDER TARGET` takes its text part"),
        (
            {"auto_map": {"AutoModel": "code.Model"}},
            "code of a checkpoint is never run",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized weights cannot be trained"),
        ({"num_attention_heads": 5}, "config.json cannot be used"),
        ({"model_type": "falcon", "alibi": True}, "'alibi': Falcon with ALiBi positions is not"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'rope_scaling': dynamic rotary positions change with the length",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "'rope_parameters': dynamic rotary positions change with the length",
        ),
    ],
)
def test_an_unknown_model_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    change_config(path, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=words) as refused:
        Checkpoint.open(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "hf download HuggingFaceTB/SmolLM2-135M --local-dir"),
        ("./nowhere", "no such checkpoint folder"),
        ("model.gguf", "talipot import .*model.gguf FOLDER"),
    ],
)
def test_what_is_no_folder_is_refused_with_what_brings_one(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is absent, the model"),
        ({"num_hidden_layers": 1}, r"'model.layers.1.*the model needs none of that name"),
        ({"intermediate_size": 64}, r"down_proj.weight' is \(32, 48\), the model needs \(32, 64\)"),
    ],
)
def test_weights_of_another_model_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = random_checkpoint(tmp_path / "model")
    change_config(path, **settings)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SETTINGS["llama"], **settings}))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(path).load_into(other)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "blobs", max_shard_size="20KB")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in path.iterdir():
        (linked / file.name).symlink_to(file)
    checkpoint = Checkpoint.open(linked)
    (tmp_path / "again").mkdir()
    write_like(checkpoint, dict(checkpoint.tensors()), tmp_path / "again")
    shutil.rmtree(path)
    assert module_of(tmp_path / "again") is not None
