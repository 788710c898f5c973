"""A recipe before it is validated: what a file and the command line say, and where.

Nothing is validated here but the shape: which names are sections, and which values are texts.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from common.config.base import Family, Section, is_list_of_texts
from common.config.yaml_text import Key, Written
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was given."""

    text: str
    """``recipe.yaml:3`` or ``override 'a=1'``."""
    in_file: bool


@dataclass(slots=True)
class Draft:
    """Values by section, as they will be validated, and the place of each."""

    root: type[Section]
    name: str
    """What errors of no single place begin with."""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    resolved: bool = False
    """The file has every section."""

    def add_file(self, written: Written) -> None:
        """Take a whole file.

        Raises:
            ConfigError: it is not a mapping, or leaves empty what may be null or a section: whether
                defaults or nothing were meant is not ours to guess.
        """
        if written.values is None:
            return
        if not isinstance(written.values, dict):
            kind = type(written.values).__name__
            raise ConfigError(f"{self.name}:1: a recipe is a mapping of sections, not {kind}")
        self.values = self._plain((), written)
        self.resolved = self.values.keys() >= self.root.model_fields.keys()
        self.places = {
            key: Place(f"{self.name}:{line}", in_file=True) for key, line in written.lines.items()
        }
        for key in (key for key, text in written.texts.items() if not text):
            annotation = annotation_of(self.root, key)
            if section_of(annotation) is not None and may_be_null(annotation):
                raise ConfigError(
                    f"{self.place(key)}: {'.'.join(key)} is empty: write null for none, or "
                    f"{{}} for its defaults"
                )

    def override(self, key: Key, written: Written, place: str) -> None:
        """Give one field, or some of a section's, another value than before.

        Raises:
            ConfigError: `key` leads through a value that is no section.
        """
        node, where = self.values, Place(place, in_file=False)
        for depth, name in enumerate(key[:-1], 1):
            child = node.get(name)
            if child is not None and not isinstance(child, Mapping):
                path = ".".join(key[:depth])
                before = self.place(key[:depth])
                raise ConfigError(f"{place}: {path} is {child!r} ({before}), and not a section")
            self.places.setdefault(key[:depth], where)
            node[name] = dict(child or {})
            node = node[name]
        self._put(node, key, self._plain(key, written), where)

    def place(self, key: Key) -> str:
        """Say where a field was given, or else the section that it would be in."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]].text
        return self.name

    def given(self) -> Iterator[tuple[Key, Place]]:
        """Yield every field that was given, and where.

        A file with every section there is was printed or saved: where it only repeats a default,
        nobody asked for that.
        """
        for path, section, values in sections(self.root, self.values):
            for name, value in values.items():
                key, info = (*path, name), section.every_field().get(name)
                place = self.places.get(key)
                # Nobody wrote what has no place: it is what an earlier version did.
                if info is None or place is None or _is_inside(info.annotation, value):
                    continue
                default = value == _written(info.get_default(call_default_factory=True))
                if not (self.resolved and default and place.in_file):
                    yield key, place

    def _put(self, node: dict[str, Any], key: Key, value: Any, place: Place) -> None:
        """Put fields of a section one by one; anything else replaces what was there."""
        before = node.get(key[-1])
        annotation = annotation_of(self.root, key)
        if isinstance(value, dict) and isinstance(before, Mapping) and section_of(annotation):
            inside = node[key[-1]] = dict(before)
            for name, part in value.items():
                self._put(inside, (*key, name), part, place)
            return
        node[key[-1]] = value
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}
        self._place_all(key, value, place)

    def _place_all(self, key: Key, value: Any, place: Place) -> None:
        self.places[key] = place
        if isinstance(value, Mapping):
            for name, part in value.items():
                self._place_all((*key, name), part, place)

    def _plain(self, key: Key, written: Written) -> Any:
        """Return the values below `key`, and the text itself wherever the field is a text.

        A run called 007 is not called 7.
        """

        def convert(value: Any, path: Key) -> Any:
            if isinstance(value, dict):
                return {name: convert(part, (*path, name)) for name, part in value.items()}
            if isinstance(value, list):
                return [convert(part, (*path, str(at))) for at, part in enumerate(value)]
            if value is None or isinstance(value, str) or path not in written.texts:
                return value
            wanted = annotation_of(self.root, (*key, *path))
            return written.texts[path] if is_text(wanted) or is_list_of_texts(wanted) else value

        return convert(written.values, ())


# -------------------------------------------------------------------------- kinds of sections


def sections(
    section: type[Section], values: Mapping[str, Any], path: Key = ()
) -> Iterator[tuple[Key, type[Section], Mapping[str, Any]]]:
    """Walk through all sections of a recipe: the names to each, its type and its values."""
    yield path, section, values
    for name, value in values.items():
        info = section.every_field().get(name)
        if info is None or not isinstance(value, Mapping):
            continue
        inner, named = section_of(info.annotation), named_section_of(info.annotation)
        if inner is not None:
            yield from sections(inner, value, (*path, name))
        elif named is not None:
            for own, part in value.items():
                if part is None or isinstance(part, Mapping):
                    yield from sections(named, part or {}, (*path, name, own))


def of_other_kinds(root: type[Section], values: Mapping[str, Any]) -> dict[Key, str]:
    """Find fields that the kind of their section has not; of each, which kinds have it."""
    others: dict[Key, str] = {}
    for path, family, given in sections(root, values):
        kind = family.kind_of(given)
        if not issubclass(family, Family) or kind is None:
            continue
        for name in given:
            if name in family.every_field() and name not in kind.model_fields:
                have = [k for k, each in family.kinds.items() if name in each.model_fields]
                chosen = kind.model_fields["kind"].default
                when = f"it has one under kind {' or '.join(have)}"
                others[(*path, name)] = f"kind is {chosen}; {when}"
    return others


def without(values: Mapping[str, Any], keys: Collection[Key]) -> dict[str, Any]:
    """Copy a recipe's values, leaving out these fields."""
    return {
        name: without(value, {key[1:] for key in keys if key[0] == name})
        if isinstance(value, Mapping)
        else value
        for name, value in values.items()
        if (name,) not in keys
    }


# -------------------------------------------------------------------------- types of fields


def annotation_of(root: type[Section], key: Key) -> Any:
    """Return the type of what a key leads to; None where there is no such field.

    That is a field, an item of a list, or what one of the user's own names stands for.
    """
    annotation: Any = root
    for name in key:
        section = section_of(annotation)
        if section is not None:
            info = section.every_field().get(name)
            annotation = None if info is None else info.annotation
        elif get_origin(annotation) is tuple and name.isdigit():
            annotation = get_args(annotation)[0]
        elif _is_mapping(annotation):
            annotation = get_args(annotation)[1]
        else:
            return None
    return annotation


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a field is, or may be."""
    for candidate in _choices(annotation):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def only_section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a field is, or null; None where it may be anything else."""
    choices = [choice for choice in _choices(annotation) if choice is not type(None)]
    return section_of(annotation) if len(choices) == 1 else None


def named_section_of(annotation: Any) -> type[Section] | None:
    """Return the section that each of the user's own names stands for."""
    return section_of(get_args(annotation)[1]) if _is_mapping(annotation) else None


def may_be_null(annotation: Any) -> bool:
    """Whether null is a value of a field."""
    return type(None) in _choices(annotation)


def is_text(annotation: Any) -> bool:
    """Whether a field holds a text, and nothing else but perhaps null."""
    choices = _choices(annotation)
    kinds = {type(v) for c in choices if get_origin(c) is Literal for v in get_args(c)}
    kinds |= {c for c in choices if isinstance(c, type)}
    return {str} <= kinds <= {str, type(None)}


def _is_inside(annotation: Any, value: Any) -> bool:
    """Whether the value is a section, or a mapping of sections: fields of its own were given."""
    return isinstance(value, Mapping) and bool(
        section_of(annotation) or named_section_of(annotation)
    )


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is Mapping


def _choices(annotation: Any) -> list[Any]:
    """Return the members of a union, without their annotations."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return [annotation]


def _written(value: Any) -> Any:
    """Return a default as YAML would give it."""
    if isinstance(value, tuple):
        return [_written(part) for part in value]
    return value.model_dump(mode="json") if isinstance(value, Section) else value
