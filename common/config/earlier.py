"""What earlier versions wrote down of a configuration, as this one reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config.draft import of_other_kinds, without
from common.config.run import RunConfig
from common.config.yaml_text import Key

_BEFORE: dict[str, dict[str, Any]] = {
    "train": {"adam_eps": 1e-5},
    "reward_service": {"precision": "fp32"},
}
"""What versions did that had no setting for it, where it was not what is the default now."""
RENAMED: dict[Key, Key] = {
    (section, "clip"): (section, "max_grad_norm") for section in ("sft", "reward_model", "train")
}
"""Fields of earlier versions, and what they are called now."""


def saved_config(values: Mapping[str, Any]) -> RunConfig:
    """Read what a run wrote down of its configuration, with this version or an earlier one.

    Raises:
        ValidationError: it is none.
    """
    known = as_of_now(values)
    return RunConfig.model_validate(without(known, of_other_kinds(RunConfig, known)))


def as_of_now(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add what versions did that had no setting for it, and call every field what it is now.

    Fields that the kind of their section has not stay: whoever reads a file may want to name them.
    """
    return {
        section: _BEFORE.get(section, {})
        | {_now(section, name): value for name, value in part.items()}
        if isinstance(part, Mapping)
        else part
        for section, part in values.items()
    }


def settings_as_of_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Do the same for some of the fields, by their dotted names."""
    names = {".".join(old): ".".join(new) for old, new in RENAMED.items()}
    now = {names.get(name, name): value for name, value in settings.items()}
    has_model = any(name.startswith("model.") for name in now)
    return now | ({"model.kind": now.get("model.kind", "palm")} if has_model else {})


def _now(section: str, name: str) -> str:
    return RENAMED.get((section, name), (section, name))[1]
