"""Recipes: configuration in YAML files and on the command line.

A recipe has one section per component; the command line overrides single fields by their dotted
names (``learner.zero_stage=2``), and of two overrides of one field the last counts. Unknown keys
are refused with the nearest valid name, and so is a setting that changes nothing under the others
(`common.config.effects`). The resolved configuration is saved with every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from common.config.base import is_list_of_texts
from common.config.draft import (
    Draft,
    Place,
    annotation_of,
    is_text,
    may_be_null,
    of_other_kinds,
    without,
)
from common.config.earlier import as_of_now
from common.config.effects import without_effect
from common.config.mistakes import judged
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.config.yaml_text import Key, Written, read_yaml
from common.errors import ConfigError
from common.files import is_utf8, write_atomic

_YAML = "[{~&!|>'\"#"
"""What only YAML begins with, in place of a list of texts."""
_NULLS = ("~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class Judged:
    """A recipe, and what is wrong with it."""

    config: RunConfig | None
    """What is left of it without what is wrong; None where that is nothing."""
    mistakes: Sequence[str]
    """Each with its place."""


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
    *,
    saved: bool = False,
) -> RunConfig:
    """Read a recipe, apply dotted ``key=value`` overrides in their order, validate.

    Args:
        path: the recipe; None for the defaults.
        overrides: as on the command line; a text field takes the text as it stands, others YAML.
        given: values by dotted field that are known already and never parsed, such as a folder;
            they are set last.
        saved: the file is what a run saved of its configuration. It holds every field, so only
            overrides must have an effect.

    Raises:
        ConfigError: naming file and line or the override, the dotted field and what to do.
    """
    found = judge_recipe(path, overrides, given, saved=saved)
    if found.mistakes or found.config is None:
        raise ConfigError("; ".join(found.mistakes))
    return found.config


def judge_recipe(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
    *,
    saved: bool = False,
) -> Judged:
    """Do as `load_config`, and return what is wrong instead of raising it.

    Raises:
        ConfigError: the file cannot be read, is no YAML or no mapping; an override is none.
    """
    draft = Draft(RunConfig, "overrides" if path is None else str(path))
    if path is not None:
        draft.add_file(read_yaml(_text(Path(path)), partial(_at, str(path))))
        if saved:
            draft.values = as_of_now(draft.values)
    for override in overrides:
        _apply_override(draft, override)
    asked = [(key, place) for key, place in draft.given() if not (saved and place.in_file)]
    other_kinds = of_other_kinds(RunConfig, draft.values)
    draft.values = without(draft.values, other_kinds)
    config, mistakes = judged(draft)
    # What is idle depends on other fields: of sections that are wrong nobody knows them.
    wrong = {mistake.key[:1] for mistake in mistakes}
    idle = other_kinds | _idle_preset(draft.values)
    idle |= without_effect(config) if config else {}
    said = [str(mistake) for mistake in mistakes]
    said += _of_no_effect([each for each in asked if each[0][:1] not in wrong], idle)
    if not given or config is None:
        return Judged(config, said)
    for name, value in given.items():
        draft.override(tuple(name.split(".")), Written(values=value), name)
    config, mistakes = judged(draft)
    return Judged(config, said + [text for text in map(str, mistakes) if text not in said])


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back equal.

    Raises:
        StorageError: it cannot be written; what was there stays.
    """
    write_atomic(path, [dump_config(config).encode()])


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _at(name: str, line: int | None) -> str:
    return name if line is None else f"{name}:{line}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; give --config an existing file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _apply_override(draft: Draft, override: str) -> None:
    name, equals, text = override.partition("=")
    key = tuple(name.split("."))
    if not equals or not all(key):
        raise ConfigError(f"override '{override}': write it as section.field=value")
    place = f"override '{override}'"
    if not is_utf8(override):
        raise ConfigError(f"{place}: is not UTF-8; rename what it names")
    annotation = annotation_of(RunConfig, key)
    plain = bool(text) and text[0] not in _YAML and text not in _NULLS
    if is_list_of_texts(annotation) and plain:
        written = Written(values=[text])  # `*.jsonl` is a pattern, and an alias to YAML
    elif not is_text(annotation):
        written = read_yaml(text, lambda _: place)
    elif text in _NULLS or (not text and may_be_null(annotation)):
        written = Written(values=None)
    else:
        written = Written(values=_unquoted(text))
    draft.override(key, written, place)


def _unquoted(text: str) -> str:
    """Take one pair of YAML quotes off, if it stands around the whole text."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, str) else text


def _of_no_effect(given: Iterable[tuple[Key, Place]], idle: Mapping[Key, str]) -> list[str]:
    """Refuse what was given and changes nothing."""
    refused = [
        f"{place.text}: {'.'.join(key)} has no effect here: {idle[key]}"
        for key, place in given
        if key in idle
    ]
    if refused:
        refused[-1] += f"; leave {'it' if len(refused) == 1 else 'them'} out"
    return refused


def _idle_preset(values: Mapping[str, Any]) -> dict[Key, str]:
    """Say why a preset changes nothing where `model` has every field of its kind."""
    model = values.get("model") or {}
    kind = ModelConfig.kind_of(model) or ModelConfig
    if values.get("preset") and {*model, "kind"} >= kind.model_fields.keys():
        return {("preset",): "every field of model is given, and goes before it"}
    return {}
