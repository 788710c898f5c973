"""A recipe in the making: what a file and the command line say, and where each said it.

Nothing is validated here but the shape: which names are sections, and which values are texts.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from common.config.base import Section
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
        """Where a field was given, or the section that it would be in."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]].text
        return self.name

    def given(self) -> Iterator[tuple[Key, Place]]:
        """Every field that was given and where, depth first.

        A file with every section there is was printed or saved: what it says and is the default
        anyway is not taken for a wish.
        """
        yield from self._given(self.root, self.values, ())

    def _given(
        self, section: type[Section], values: Mapping[str, Any], path: Key
    ) -> Iterator[tuple[Key, Place]]:
        for name, value in values.items():
            key, info = (*path, name), section.model_fields[name]
            inner, named = section_of(info.annotation), named_section_of(info.annotation)
            if inner is not None and isinstance(value, Mapping):
                yield from self._given(inner, value, key)
            elif named is not None and isinstance(value, Mapping):
                for own, part in value.items():
                    yield from self._given(named, part or {}, (*key, own))
            else:
                place = self.places.get(key)
                if place is None:  # nobody wrote it: what an earlier version did
                    continue
                default = value == _written(info.get_default(call_default_factory=True))
                if not (self.resolved and default and place.in_file):
                    yield key, place

    def _put(self, node: dict[str, Any], key: Key, value: Any, place: Place) -> None:
        """A section is taken apart into its fields; anything else replaces what was there."""
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
        """What was written below `key`, with the text itself wherever a text is wanted: a run
        called 007 is not called 7."""

        def convert(value: Any, path: Key) -> Any:
            if isinstance(value, dict):
                return {name: convert(part, (*path, name)) for name, part in value.items()}
            if isinstance(value, list):
                return [convert(part, (*path, str(at))) for at, part in enumerate(value)]
            if value is None or isinstance(value, str) or path not in written.texts:
                return value
            wanted = annotation_of(self.root, (*key, *path))
            return written.texts[path] if is_text(wanted) else value

        return convert(written.values, ())


# -------------------------------------------------------------------------- types of fields


def annotation_of(root: type[Section], key: Key) -> Any:
    """The type of a field, of an item of a list, or of what a name of the user's stands for; None
    where there is no such field."""
    annotation: Any = root
    for name in key:
        section = section_of(annotation)
        if section is not None:
            info = section.model_fields.get(name)
            annotation = None if info is None else info.annotation
        elif get_origin(annotation) is tuple and name.isdigit():
            annotation = get_args(annotation)[0]
        elif _is_mapping(annotation):
            annotation = get_args(annotation)[1]
        else:
            return None
    return annotation


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field is, or may be."""
    for candidate in _choices(annotation):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def named_section_of(annotation: Any) -> type[Section] | None:
    """The section that each name of the user's own stands for."""
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


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is Mapping


def _choices(annotation: Any) -> list[Any]:
    """The members of a union, without what annotates them."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return [annotation]


def _written(value: Any) -> Any:
    """A default as YAML would give it."""
    if isinstance(value, tuple):
        return [_written(part) for part in value]
    return value.model_dump(mode="json") if isinstance(value, Section) else value
