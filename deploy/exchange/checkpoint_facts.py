"""What a recipe's checkpoints say of themselves, and what of it a run uses (`talipot config`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from common.config.model import PretrainedConfig
from common.config.run import RunConfig
from common.data.pretrained_tokenizer import PretrainedTokenizer
from common.data.tokenizer import load_tokenizer
from common.errors import TalipotError
from common.models.pretrained.config_files import CONFIG, GENERATION, read_config, read_json

_INSTEAD: Final = {
    "temperature": "temperature",
    "do_sample": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_new_tokens": "max_response_tokens",
    "min_new_tokens": "min_response_tokens",
    "stop_strings": "stop",
}
"""Generation defaults, and the field of `rollout` that decides in their place."""
_ENDS: Final = "eos_token_id"
_NO_DEFAULTS: Final = {"transformers_version", "bos_token_id", "pad_token_id", "use_cache"}
_FACTS: Final = ("vocab_size", "max_position_embeddings")


def lines_of(config: RunConfig) -> Iterator[str]:
    """Yield lines on every checkpoint that the recipe names; one that cannot be read says why."""
    models = {
        "model": config.model,
        "train.critic": config.train.critic,
        "reward_service.reference": config.reward_service.reference,
        "reward_model.model": config.reward_model.model,
    }
    for field, model in models.items():
        if not isinstance(model, PretrainedConfig):
            continue
        try:
            values = read_config(Path(model.start))
            facts = ", ".join(f"{key} {values[key]}" for key in _FACTS if key in values)
            yield f"{field}.start {model.start}: {values.get('model_type')}, {facts} ({CONFIG})"
            if field == "model":
                yield from _of_policy(config, Path(model.start))
        except TalipotError as error:
            yield f"{field}.start: {error}"


def _of_policy(config: RunConfig, folder: Path) -> Iterator[str]:
    """Yield the generation defaults, each with what the run does, and what ends a response."""
    defaults = read_json(folder / GENERATION)
    if defaults is None:
        yield f"  no {GENERATION}: it has no generation defaults"
    for key, value in (defaults or {}).items():
        if line := _default(config, key, value):
            yield f"  {GENERATION}: {line}"
    rollout = config.rollout
    tokenizer = load_tokenizer(config.tokenizer.path or folder, config.tokenizer.chat_template)
    if isinstance(tokenizer, PretrainedTokenizer):
        listed = ", ".join(f"{i} {tokenizer.spelling(i)}" for i in tokenizer.stop_ids)
        more = f", and rollout.stop_ids {list(rollout.stop_ids)}" if rollout.stop_ids else ""
        yield f"  a response ends with {listed}{more}"


def _default(config: RunConfig, key: str, value: Any) -> str:
    """Say what becomes of one default; empty of what is none."""
    if key.startswith(("_", "output_")) or key in _NO_DEFAULTS or value is None:
        return ""
    shown = f"{key} {json.dumps(value, ensure_ascii=False)}"
    if key == _ENDS:
        return f"{shown} ends a response"
    if key not in _INSTEAD:
        return f"{shown} is not used: no setting of a run does this"
    field = _INSTEAD[key]
    rollout: Mapping[str, Any] = config.rollout.model_dump(mode="json")
    return f"{shown} is not used: rollout.{field} is {json.dumps(rollout[field])}"
