"""Text fields of a recipe are the text that was written, not what YAML makes of it.

YAML reads ``007`` as 7, ``2024-11-28`` as a date and ``no`` as false, and ``exp #2`` ends at its
``#``. Where the configuration has a text (a name, a path, a label), none of that was meant. Only
null keeps its meaning, "none"; a text that reads so is quoted.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from common.model_config import Section

_NULLS = ("~", "null", "Null", "NULL")


def read_override(text: str, kind: Any) -> Any:
    """The value of a field of type `kind` from the command line.

    A text field takes the text whole, one pair of YAML quotes around all of it taken off. Null is
    null, so that a setting is never switched off by a name; nothing is null where that is allowed.
    Any other field is YAML.

    Raises:
        yaml.YAMLError: it is not.
    """
    kinds = _alternatives(kind)
    if str not in kinds:
        return as_written(yaml.safe_load(text), yaml.load(text, yaml.BaseLoader), kind)
    if text in _NULLS or (not text and types.NoneType in kinds):
        return None
    return _unquoted(text)


def as_written(value: Any, text: Any, kind: Any) -> Any:
    """`value` with the text that was written wherever a field of type `kind` is a text.

    Args:
        value: what YAML read.
        text: the same document with every scalar as its text (`yaml.BaseLoader`).
        kind: a type of the configuration: a section, or a field's annotation.
    """
    kinds = _alternatives(kind)
    if isinstance(value, dict) and isinstance(text, dict):
        return _mapping_as_written(value, text, kinds)
    if isinstance(value, list) and isinstance(text, list):
        item = next((get_args(k)[0] for k in kinds if get_origin(k) is tuple), None)
        pairs = zip(value, text, strict=True)
        return [as_written(inner, written, item) for inner, written in pairs]
    if value is None or isinstance(value, str) or not isinstance(text, str):
        return value
    meant = str in kinds or any(text in get_args(k) for k in kinds if get_origin(k) is Literal)
    return text if meant else value


def kind_at(kind: Any, path: Sequence[str]) -> Any:
    """The type of a dotted field, seen from a section; None where there is no such field."""
    for name in path:
        kinds = _alternatives(kind)
        section, values = _section(kinds), _values(kinds)
        if section is not None and name in section.model_fields:
            kind = section.model_fields[name].annotation
        else:
            kind = values
    return kind


def _mapping_as_written(
    value: dict[Any, Any], text: dict[Any, Any], kinds: Sequence[Any]
) -> dict[Any, Any]:
    section, values = _section(kinds), _values(kinds)
    if section is None and values is not None and len(value) == len(text):
        # The user's own names, texts too: both readings have them in the order of the file.
        pairs = zip(value.values(), text.items(), strict=True)
        return {name: as_written(inner, written, values) for inner, (name, written) in pairs}
    if section is None:
        return value
    fields = section.model_fields
    return {
        name: as_written(inner, text.get(name), fields[name].annotation)
        if name in fields
        else inner
        for name, inner in value.items()
    }


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a field may have, without what annotates them."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _alternatives(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return tuple(inner for arg in get_args(kind) for inner in _alternatives(arg))
    return (kind,)


def _section(kinds: Sequence[Any]) -> type[Section] | None:
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _values(kinds: Sequence[Any]) -> Any:
    """What a mapping of the user's own names holds."""
    found = (get_args(k)[1] for k in kinds if get_origin(k) in (dict, Mapping))
    return next(found, None)


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, str) else text
