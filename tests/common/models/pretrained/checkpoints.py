"""Tiny random checkpoints of several families, as `transformers` itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PLAIN: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 258,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "gemma2": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt_neox": {**_PLAIN, "tie_word_embeddings": False},
    "phi": {**_GROUPED, "partial_rotary_factor": 0.5},
    "falcon": {
        **{k: v for k, v in _PLAIN.items() if k != "intermediate_size"},
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
}
"""By family: a configuration that takes milliseconds."""


def random_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    labels: int = 0,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a random model with a byte-level tokenizer and a chat template."""
    config = CONFIG_MAPPING[family](**(settings or SETTINGS[family]))
    torch.manual_seed(seed)
    if labels:
        config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that each has its place
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and one pair of them, two control tokens, and a template in a file."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
