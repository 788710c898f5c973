"""Runs of a chat model: SmolLM2's shape with few layers and random weights; conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from tests.common.data.tokenizers import byte_level
from tests.workspaces import tiny_recipe

LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "o_proj", "down_proj"]}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_THINGS = ["ships", "rivers", "maps", "the harbour", "the hills", "Paris", "a capital", "the sea"]


def smollm2(folder: Path, *, head_dim: int = 64, layers: int = 2) -> Path:
    """A checkpoint: 9 heads of queries for 3 of keys and values, an MLP 8/3 as wide, a tied head,
    rows for tokens that the tokenizer does not have, pad equal to the end of a turn."""
    byte_level(folder, pad_token="<|im_end|>")
    width = 9 * head_dim
    shape = LlamaConfig(
        vocab_size=448,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=1.5 / width**0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def make_chat_workspace(root: Path, *, head_dim: int = 64) -> RunConfig:
    """A run's folder, its checkpoint and its conversations; its config: adapters, a function."""
    start = smollm2(root / "start", head_dim=head_dim)
    rng = np.random.default_rng(0)
    asked = [(rng.choice(list(_LETTERS)), rng.choice(_THINGS)) for _ in range(200)]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": f"Write '{letter}' often, and of {thing}."},
            ]
        }
        for letter, thing in asked
    ]
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    tokenizer = load_tokenizer(start)
    values = tiny_recipe(root)
    values["model"] = {"start": str(start), "context": 96, "vocab_size": tokenizer.vocab_size}
    values["data"] = {"prompts": [str(prompts)]}
    values["train"] |= {"lora": LORA, "lr": 1e-3}
    values["train"]["ppg"] |= {"e_aux": 2}
    score = {"kind": "function", "target": "tests.rewards:letters"}
    values["reward_service"] |= {"components": {"letters": score}}
    config = RunConfig.model_validate(values)
    tokenizer.save(config.folder.pretrained_tokenizer)
    return config
