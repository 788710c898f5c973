"""Recipes: configuration in YAML files and on the command line.

A recipe has one section per component; the command line overrides single fields by their dotted
names (``learner.zero_stage=2``), and of two overrides of one field the last counts. Unknown keys
are refused with the nearest valid name, and so is a setting that changes nothing under the others
(`common.config.effects`). The resolved configuration is saved with every run.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from common.config.base import Family, Section, is_list_of_texts
from common.config.draft import (
    Draft,
    Place,
    annotation_of,
    is_text,
    may_be_null,
    of_other_kinds,
    only_section_of,
    section_of,
    without,
)
from common.config.earlier import RENAMED, as_of_now
from common.config.effects import without_effect
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.config.yaml_text import Key, Written, read_yaml
from common.errors import ConfigError
from common.files import is_utf8, write_atomic

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60
_NULLS = ("~", "null", "Null", "NULL")
_WORDS = {
    "tuple_type": "should be a list",
    "model_type": "should be a section",
    "mapping_type": "should be a section",
    "dict_type": "should be a mapping, as {a: b}",
    "too_short": "has too few items",
    "missing": "is missing",
}
"""Of pydantic's kinds of errors, where its own words are Python's."""


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
    config = _validate(draft)
    _require_effects(asked, without_effect(config) | other_kinds | _idle_preset(draft.values))
    if not given:
        return config
    for name, value in given.items():
        draft.override(tuple(name.split(".")), Written(values=value), name)
    return _validate(draft)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back equal.

    Raises:
        StorageError: it cannot be written; what was there stays.
    """
    write_atomic(path, [dump_config(config).encode()])


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield every dotted field as (name, default, description), for the reference page.

    A section in place of a plain value is one field, written on one line, and so is a mapping of
    sections: its keys are the user's own names. So is a family that may be null, such as a second
    model: its fields are those of the first.
    """
    for name, info in section.every_field().items():
        inner = only_section_of(info.annotation)
        default = info.get_default(call_default_factory=True)
        if inner is None or default is None:
            yield prefix + name, default, info.description or ""
        if inner is not None and not (default is None and issubclass(inner, Family)):
            yield from fields(inner, f"{prefix}{name}.")


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
    if is_list_of_texts(annotation) and text and text[0] not in "[~&!|>'\"#" and text not in _NULLS:
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


def _require_effects(given: Iterable[tuple[Key, Place]], idle: Mapping[Key, str]) -> None:
    """Refuse what was given and changes nothing."""
    refused = [
        f"{place.text}: {'.'.join(key)} has no effect here: {idle[key]}"
        for key, place in given
        if key in idle
    ]
    if refused:
        it = "it" if len(refused) == 1 else "them"
        raise ConfigError(f"{'; '.join(refused)}; leave {it} out")


def _idle_preset(values: Mapping[str, Any]) -> dict[Key, str]:
    """Say why a preset changes nothing where `model` has every field of its kind."""
    model = values.get("model") or {}
    kind = ModelConfig.kind_of(model) or ModelConfig
    if values.get("preset") and {*model, "kind"} >= kind.model_fields.keys():
        return {("preset",): "every field of model is given, and goes before it"}
    return {}


def _validate(draft: Draft) -> RunConfig:
    try:
        return RunConfig.model_validate(draft.values)
    except ValidationError as error:
        raise ConfigError(_explain(error, draft)) from None
    except RecursionError:
        raise ConfigError(f"{draft.name}: nested too deep") from None


def _explain(error: ValidationError, draft: Draft) -> str:
    """Put all problems on one line: place, dotted field, what is wrong, the nearest valid name."""
    problems: dict[Key, list[str]] = {}
    shown: dict[Key, str] = {}
    for item in error.errors():
        kind, given = item["type"], item.get("input")
        key = _key(item["loc"], kind == "extra_forbidden")
        name = ".".join(key)
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        message = _WORDS.get(kind, message)
        if kind == "model_type" and may_be_null(annotation_of(RunConfig, key)):
            message += " or null"
        if kind == "extra_forbidden":
            message = f"unknown key '{name}'{_meant(key)}"
        elif given is None:
            message = f"{name}: {message}, and not empty"
        else:
            message = f"{name}: {message}" if key else message
            if not isinstance(given, Mapping | Section):
                shown[key] = f", not {_SHOWN.repr(given)}"
        known = problems.setdefault(key, [])
        if message not in known:
            known.append(message if not known else message.removeprefix(f"{name}: "))
    return "; ".join(
        f"{draft.place(key)}: {' or '.join(messages)}{shown.get(key, '')}"
        for key, messages in problems.items()
    )


def _key(location: Sequence[int | str], unknown: bool) -> Key:
    """Return a field's names, without those that pydantic gives to the members of a union."""
    key: Key = ()
    for at, part in enumerate(location):
        longer = (*key, str(part))
        last = unknown and at == len(location) - 1
        if last or annotation_of(RunConfig, longer) is not None:
            key = longer
    return key


def _meant(key: Key) -> str:
    """Say what a field is called now, or which field may have been meant.

    That is one of this section with a name like it, or one of this name anywhere.
    """
    if key in RENAMED:
        return f"; it is called '{'.'.join(RENAMED[key])}' now"
    *parents, name = key
    section = section_of(annotation_of(RunConfig, tuple(parents)) if parents else RunConfig)
    near = difflib.get_close_matches(name, section.every_field() if section else [], 1, 0.5)
    meant = [".".join([*parents, *near])] if near else []
    meant += [full for full, _, _ in fields() if full.endswith(f".{name}")]
    return f"; did you mean '{meant[0]}'?" if meant else ""
