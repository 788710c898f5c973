"""Small random models of every supported family, as folders that `transformers` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.config.model import PretrainedConfig
from common.models.pretrained.decoder import PretrainedDecoder

VOCABULARY = 101
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# name -> model_type and what is special; several variants of a family where they differ.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "llama3-rotary": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        **_WINDOWS,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        **_WINDOWS,
    },
    "cohere": {"model_type": "cohere", "logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"model_type": "cohere2", "sliding_window": 6, "logit_scale": 0.25, **_WINDOWS},
    "falcon": {"model_type": "falcon", "alibi": False, "multi_query": True, "bias": False},
    "falcon-grouped": {
        "model_type": "falcon",
        "alibi": False,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 2,
    },
    "falcon-sequential": {
        "model_type": "falcon",
        "alibi": False,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5, "num_key_value_heads": 6},
    "phi3": {"model_type": "phi3", "sliding_window": 9, "partial_rotary_factor": 1.0},
    "olmo2": {"model_type": "olmo2"},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True},
    "gpt_neox-sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.2,
    },
    "glm4": {"model_type": "glm4", "partial_rotary_factor": 0.5},
}


def reference(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of a variant, as the library computes it, fp32, without dropout.

    Every weight is drawn: initialisation leaves norms at 1 and biases at 0.
    """
    values = _COMMON | VARIANTS[name] | changes
    if values["model_type"] == "falcon":
        del values["head_dim"]
    shape = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.2 if parameter.dim() > 1 else 0.1))
            if "norm" in key or "ln_" in key:
                parameter.add_(1.0)
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    """Write a model's folder."""
    model.save_pretrained(folder)
    return folder


def loaded(model: Any, folder: Path, **settings: Any) -> PretrainedDecoder:
    """The same model as our decoder."""
    saved(model, folder)
    decoder = PretrainedDecoder(PretrainedConfig(start=str(folder), context=64, **settings))
    names = decoder.state_dict().keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    decoder.load_state_dict(state)
    return decoder
