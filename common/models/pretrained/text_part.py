"""The part of a checkpoint that reads text, out of one that reads images too (gemma3)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from common.models.pretrained.checkpoint import Checkpoint, read_facts
from common.models.pretrained.config_files import CONFIG, read_json

_BOTH, _TEXT = "gemma3", "gemma3_text"
_NAMES = (
    (re.compile(r"language_model\.((?:model|lm_head)\..+)"), r"\1"),
    (re.compile(r"model\.language_model\.(.+)"), r"model.\1"),
    (re.compile(r"(lm_head\..+)"), r"\1"),
)
"""Its tensors, as versions of `transformers` have called them."""
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


def open_text_part(folder: Path) -> Checkpoint | None:
    """Read such a checkpoint as a language model; None where it is another one.

    Raises:
        CheckpointError: torn or incomplete.
    """
    outer = read_json(folder / CONFIG) or {}
    if outer.get("model_type") != _BOTH:
        return None
    config: dict[str, Any] = {key: outer[key] for key in _SHARED if key in outer}
    config |= outer.get("text_config") or {}
    config |= {"model_type": _TEXT, "architectures": ["Gemma3ForCausalLM"]}
    facts = {}
    for name, fact in read_facts(folder, _BOTH).items():
        for pattern, ours in _NAMES:
            if pattern.fullmatch(name):
                facts[pattern.sub(ours, name)] = fact
                break
    return Checkpoint.of(folder, config, facts)
