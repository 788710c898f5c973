"""Families of pretrained models: which are supported, and how their checkpoints name tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "cohere",
    "cohere2",
    "falcon",
    "phi",
    "phi3",
    "olmo2",
    "gpt_neox",
    "granite",
    "glm4",
)
"""`model_type` of the families that are supported; each has a parity test."""
HEAD = "lm_head."
"""Begins the name of an output head of its own."""
UNQUANTIZED = "it cannot be trained: bring the checkpoint in bf16, fp16 or fp32"

_RENAMED = {"gpt_neox": (("embed_out.", HEAD),)}
"""By family: beginnings of names in files, and what the module of `transformers` calls them."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def module_name(family: str, stored: str) -> str:
    """Return the name in the module of `transformers` of a tensor in a file."""
    for theirs, ours in _RENAMED.get(family, ()):
        if stored.startswith(theirs):
            return ours + stored.removeprefix(theirs)
    return stored


def require_family(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is not supported, by the reason that helps most.

    Raises:
        CheckpointError: a mixture of experts, quantized, or of a family that is not on the list.
    """
    family, listed = config.get("model_type"), f"there are {', '.join(FAMILIES)}"
    why = ""
    if family == "gemma3":
        why = "reads images too; `talipot import FOLDER TARGET` takes its text part"
    elif "moe" in str(family) or any((config.get(key) or 0) > 1 for key in _EXPERTS):
        why = f"is a mixture of experts, which is not supported; {listed}"
    elif family not in FAMILIES and "auto_map" in config:
        why = f"brings code of its own (auto_map), which is never run; {listed}"
    elif family not in FAMILIES:
        why = f"is not supported; {listed}"
    elif config.get("quantization_config"):
        why = f"has quantized weights (quantization_config); {UNQUANTIZED}"
    if why:
        raise CheckpointError(f"{path}: model_type '{family}' {why}")
