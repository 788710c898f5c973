"""What is wrong with a recipe, in words: all of it at once, each mistake with its place.

What is refused is left out and the rest is judged again, until nothing is refused: fields that
contradict each other are found beside fields that are nothing by themselves. What was left out is
blamed for nothing else.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.config.base import CONFLICT, Section
from common.config.draft import Draft, annotation_of, may_be_null, section_of, without
from common.config.names import meant
from common.config.run import RunConfig
from common.config.yaml_text import Key
from common.errors import ConfigError

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60
_FEW_FIELDS = 3
_WORDS = {
    "tuple_type": "should be a list",
    "mapping_type": "should be a section",
    "dict_type": "should be a mapping, as {a: b}",
    "too_short": "has too few items",
    "missing": "is missing",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "string_type": "should be a text",
    "string_too_short": "should not be empty",
}
"""Of pydantic's kinds of errors, where its own words are Python's."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong."""

    key: Key
    """The field or section that it was found at; () for the recipe as a whole."""
    place: str
    """Where that was given: ``recipe.yaml:3`` or ``override 'a=1'``."""
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def judged(draft: Draft) -> tuple[RunConfig | None, list[Mistake]]:
    """Validate a draft.

    Returns:
        The recipe without what is wrong in it, None where nothing can be made of the rest; and
        every mistake.

    Raises:
        ConfigError: nested too deep.
    """
    values: Mapping[str, Any] = draft.values
    mistakes: list[Mistake] = []
    refused: set[Key] = set()
    while True:
        try:
            return RunConfig.model_validate(values), mistakes
        except RecursionError:
            raise ConfigError(f"{draft.name}: nested too deep") from None
        except ValidationError as error:
            found = _Found(draft, values, refused)
            found.add(error)
        mistakes += (m for m in found.mistakes() if m not in mistakes)
        if not found.given:
            return None, mistakes
        refused |= found.given
        values = without(values, found.given)


class _Found:
    """Errors of one pass over the values, by field."""

    def __init__(self, draft: Draft, values: Mapping[str, Any], refused: Collection[Key]) -> None:
        self.given: set[Key] = set()
        """What has to be left out of the values for these errors to go."""
        self._draft, self._values, self._refused = draft, values, refused
        self._messages: dict[Key, list[str]] = {}
        self._shown: dict[Key, str] = {}

    def add(self, error: ValidationError) -> None:
        items = [(_key(i["loc"], i["type"] == "extra_forbidden"), i) for i in error.errors()]
        for key, item in items:
            if item["type"] in (CONFLICT, "value_error"):
                self._conflict(key, item)
            elif not _belongs_to_another_choice(key, item, items):
                self._field(key, item)

    def mistakes(self) -> list[Mistake]:
        return [
            Mistake(
                key,
                self._draft.place(key),
                " or ".join([first, *(text.removeprefix("should be ") for text in others)])
                + self._shown.get(key, ""),
            )
            for key, (first, *others) in self._messages.items()
        ]

    def _conflict(self, key: Key, item: Mapping[str, Any]) -> None:
        """Take what a section says of some of its fields together."""
        names = item.get("ctx", {}).get("fields", ())
        about = [(*key, *name.split(".")) for name in names] or [key]
        given = [each for each in about if self._deepest(each) == each]
        # One of them is enough for the others to be judged.
        self.given |= {each for each in given[-1:] if each}
        if not any(_overlap(each, other) for each in about for other in self._refused):
            self._say(key, item["msg"].removeprefix("Value error, "), item)

    def _field(self, key: Key, item: Mapping[str, Any]) -> None:
        if given := self._deepest(key):
            self.given.add(given)
        if key in self._refused:
            return  # it was given, and is missing now
        kind, name = item["type"], ".".join(key)
        if kind == "extra_forbidden":
            self._messages.setdefault(key, []).append(f"unknown key '{name}'{meant(key)}")
            return
        message = item["msg"].replace("Input should", "should")
        message = message.replace("String should match pattern", "should match the pattern")
        self._say(
            key, _section_words(key) if kind == "model_type" else _WORDS.get(kind, message), item
        )

    def _say(self, key: Key, message: str, item: Mapping[str, Any]) -> None:
        name, given = ".".join(key), item.get("input")
        if given is None and item["type"] not in (CONFLICT, "value_error"):
            message += ", and not empty"
        elif given is not None and not isinstance(given, Mapping | Section):
            self._shown[key] = f", not {_SHOWN.repr(given)}"
        known = self._messages.setdefault(key, [])
        if message not in known and f"{name}: {message}" not in known:
            known.append(message if known or not key else f"{name}: {message}")

    def _deepest(self, key: Key) -> Key:
        """Return what of a key was given: the field, or what holds it."""
        node: Any = self._values
        for depth, name in enumerate(key):
            if not isinstance(node, Mapping) or name not in node:
                return key[:depth]
            node = node[name]
        return key


def _belongs_to_another_choice(
    key: Key, item: Mapping[str, Any], items: Sequence[tuple[Key, Mapping[str, Any]]]
) -> bool:
    """Whether a field of several types was given as another of them than this error is about."""
    others = [(k, i) for k, i in items if i is not item]
    if isinstance(item.get("input"), Mapping) and item["type"] in ("int_type", "missing"):
        number = item["type"] == "int_type"
        # A section was given for a number or a section; or nothing, and a section is taken for it.
        return any(
            (k[: len(key)] == key if number else k == key[:-1] and i.get("input") is None)
            for k, i in others
        )
    return False


def _section_words(key: Key) -> str:
    annotation = annotation_of(RunConfig, key)
    section = section_of(annotation)
    names = list(section.every_field()) if section else []
    few = f"{{{', '.join(f'{name}: ...' for name in names)}}}"
    words = f"should be {few if names and len(names) <= _FEW_FIELDS else 'a section'}"
    return f"{words} or null" if may_be_null(annotation) else words


def _overlap(key: Key, other: Key) -> bool:
    shorter = min(len(key), len(other))
    return key[:shorter] == other[:shorter]


def _key(location: Sequence[int | str], unknown: bool) -> Key:
    """Return a field's names, without those that pydantic gives to the members of a union."""
    key: Key = ()
    for at, part in enumerate(location):
        longer = (*key, str(part))
        last = unknown and at == len(location) - 1
        if last or annotation_of(RunConfig, longer) is not None:
            key = longer
    return key
