"""Recipes: configuration in YAML files and on the command line.

A recipe has one section per component; the command line overrides single fields by their dotted
names (``learner.zero_stage=2``). Unknown keys are refused with the nearest valid name, and the
resolved configuration is saved with every run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from common.as_written import as_written, kind_at, read_override
from common.config import RunConfig
from common.errors import ConfigError
from common.files import is_utf8, write_atomic
from common.model_config import Section


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
) -> RunConfig:
    """Read a recipe, apply dotted ``key=value`` overrides, then `given`, validate.

    Args:
        path: the recipe; None takes every default.
        overrides: as on the command line; a text field takes the text as it stands, others YAML.
        given: values by dotted field that are known already and never parsed, such as a folder.

    Raises:
        ConfigError: naming the file, the dotted field and the mend.
    """
    values: dict[str, Any] = {}
    where = "override"
    if path is not None:
        where = str(path)
        values = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(values, override)
    for field, value in given.items():
        _set(values, field, value)
    return _validate(values, where)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back equal.

    Raises:
        StorageError: it cannot be written; what was there stays.
    """
    write_atomic(path, [dump_config(config).encode()])


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every dotted field as (name, default, description), depth first; for the reference page."""
    for name, info in section.model_fields.items():
        inner, default = _section_of(info.annotation), info.get_default(call_default_factory=True)
        if inner is None or default is None:
            yield prefix + name, default, info.description or ""
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; give --config an existing file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}{line}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}:1: a recipe is a mapping of sections, not {type(values).__name__}"
        )
    written: dict[str, Any] = as_written(values, yaml.load(text, yaml.BaseLoader), RunConfig)
    return written


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': write it as section.field=value")
    if not is_utf8(override):
        raise ConfigError(f"override '{override}': is not UTF-8; rename what it names")
    try:
        value = read_override(text, kind_at(RunConfig, key.split(".")))
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{text}' is not a YAML value") from None
    _set(values, key, value)


def _set(values: dict[str, Any], field: str, value: Any) -> None:
    node = values
    *parents, leaf = field.split(".")
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, Mapping) else {}
        node = node[parent]
    node[leaf] = value


def _validate(values: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """All problems on one line: dotted field, what is wrong, and the nearest valid name."""
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            *parents, name = [str(part) for part in item["loc"]]
            known = [full.removeprefix(".".join([*parents, ""])) for full, _, _ in fields()]
            known = sorted({name.split(".")[0] for name in known})
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean '{'.'.join([*parents, near[0]])}'?" if near else ""
            problems.append(f"unknown key '{path}'{hint}")
            continue
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        given = item.get("input")
        shown = "" if isinstance(given, dict | Section) else f", not {given!r}"
        problems.append(f"{path}: {message}{shown}" if path else message)
    return "; ".join(problems)


def _section_of(annotation: Any) -> type[Section] | None:
    if any(arg in (int, str) or get_args(arg)[:1] == (int,) for arg in get_args(annotation)):
        return None  # A section in place of a plain value is one field, written on one line.
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            # A mapping of sections is one field: its keys are the user's own names.
            return (
                None
                if getattr(annotation, "__origin__", None) is not None
                and len(get_args(annotation)) == 2
                and get_args(annotation)[0] is str
                else candidate
            )
    return None
