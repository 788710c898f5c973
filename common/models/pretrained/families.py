"""The families of pretrained models that are supported, and what is special in each.

A family is a `model_type` of `transformers`, whose module computes it. What is not its module's is
here: what becomes of the head's products, and which of its variants cannot be run. Every family has
a parity test (``tests/common/models/pretrained``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from common.errors import CheckpointError, ConfigError
from common.files import one_line
from common.models.attention import capped
from common.models.decoder import Sizes
from common.models.pretrained.config_files import CONFIG, read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRule:
    """What becomes of the products of states and output head."""

    scale: float = 1.0
    softcap: float | None = None
    """As `common.models.attention.Mixing.softcap`; after the scale."""

    def __call__(self, logits: Tensor) -> Tensor:
        """``[..., V] -> [..., V]``."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else capped(logits, self.softcap)


_ROTARY = ("rope_parameters", "rope_scaling")
"""Fields of rotary positions, of today and before."""

Shape = PretrainedConfig
"""A model's configuration as `transformers` reads it."""


def _plain(shape: Shape) -> LogitsRule:
    return LogitsRule()


def _scaled(shape: Shape) -> LogitsRule:
    return LogitsRule(scale=shape.logit_scale)


def _divided(shape: Shape) -> LogitsRule:
    return LogitsRule(scale=1.0 / shape.logits_scaling)


def _softcapped(shape: Shape) -> LogitsRule:
    return LogitsRule(softcap=shape.final_logit_softcapping)


FAMILIES: Mapping[str, Callable[[Shape], LogitsRule]] = {
    "llama": _plain,
    "mistral": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
    "smollm3": _plain,
    "gemma2": _softcapped,
    "gemma3_text": _softcapped,
    "cohere": _scaled,
    "cohere2": _scaled,
    "falcon": _plain,
    "phi": _plain,
    "phi3": _plain,
    "olmo2": _plain,
    "gpt_neox": _plain,
    "granite": _divided,
    "glm4": _plain,
}
"""What becomes of the head's products, by `model_type`."""


def read_shape(folder: Path) -> Shape:
    """Read and check ``config.json``; nothing is fetched, and no code of the folder is run.

    Raises:
        CheckpointError: there is none, or it is torn.
        ConfigError: it is of a family, or of a variant, that is not supported.
    """
    values, path = read_config(folder), folder / CONFIG
    require_family(values, path)
    try:
        shape: Shape = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises of many kinds for a value that it cannot take
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    return shape


def require_family(values: Mapping[str, Any], path: Path) -> None:
    """Refuse what is not supported, by what ``config.json`` says.

    Raises:
        ConfigError: names the field and the families.
    """
    family = values.get("model_type")
    experts = [key for key in values if "experts" in key and _positive(values[key])]
    if experts or "moe" in str(family):
        raise ConfigError(
            f"{path}: field '{(experts or ['model_type'])[0]}': mixtures of experts are not "
            "supported yet; use a dense model"
        )
    if family == "gemma3":
        raise ConfigError(
            f"{path}: field 'model_type': 'gemma3' reads images too; `talipot import FOLDER "
            "TARGET` takes its text part"
        )
    if family not in FAMILIES:
        raise ConfigError(
            f"{path}: field 'model_type': {family!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    if "auto_map" in values:
        raise ConfigError(
            f"{path}: field 'auto_map': code of a checkpoint is never run; `talipot import FOLDER "
            f"TARGET` makes a folder that the library's own {family} reads"
        )
    if values.get("quantization_config"):
        raise ConfigError(
            f"{path}: field 'quantization_config': quantized weights cannot be trained; bring the "
            "checkpoint in bf16, fp16 or fp32"
        )
    if family == "falcon" and values.get("alibi"):
        raise ConfigError(
            f"{path}: field 'alibi': Falcon with ALiBi positions is not supported; use one with "
            "rotary positions"
        )
    for field in _ROTARY:
        if "dynamic" in _rotary_kinds({field: values.get(field)}):
            raise ConfigError(
                f"{path}: field '{field}': dynamic rotary positions change with the length of a "
                "sequence while it is generated, and are not supported; use a model of another kind"
            )


def sizes_of(shape: Shape, context: int, folder: Path) -> Sizes:
    """Return the sizes that heads and caches depend on.

    Raises:
        ConfigError: the context is longer than the model's.
    """
    longest = _longest(shape)
    if context > longest:
        raise ConfigError(
            f"model.context={context} is longer than {folder} was made for; at most {longest}"
        )
    heads = shape.num_attention_heads
    return Sizes(
        dim=shape.hidden_size,
        context=context,
        layers=shape.num_hidden_layers,
        heads=heads,
        kv_heads=_kv_heads(shape, heads),
        head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
    )


def _kv_heads(shape: Shape, heads: int) -> int:
    if shape.model_type == "falcon":
        grouped = shape.new_decoder_architecture or not shape.multi_query
        return int(shape.num_kv_heads) if grouped else 1
    if shape.model_type == "gpt_neox":
        return heads
    return int(getattr(shape, "num_key_value_heads", None) or heads)


def _longest(shape: Shape) -> int:
    # Beyond its first length, longrope has other frequencies: keys of before would be of others.
    values = shape.to_dict()
    if "longrope" in _rotary_kinds(values):
        rope = values.get("rope_parameters") or {}
        first = rope.get("original_max_position_embeddings")
        return int(first or values.get("original_max_position_embeddings") or 0)
    return int(shape.max_position_embeddings)


def _rotary_kinds(values: Mapping[str, Any]) -> set[str]:
    """Names of the kinds of rotary positions, which may differ between kinds of layers."""
    found: set[str] = set()
    for field in _ROTARY:
        part = values.get(field)
        if isinstance(part, Mapping):
            for each in (part, *(inner for inner in part.values() if isinstance(inner, Mapping))):
                kind = each.get("rope_type", each.get("type"))
                found |= {kind} if isinstance(kind, str) else set()
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 1
