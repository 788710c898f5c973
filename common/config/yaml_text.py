"""YAML as a user writes it: values with the line and the text of each, and nothing given twice.

YAML itself takes the last of two equal keys, which loses the first without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from common.errors import ConfigError

Key = tuple[str, ...]
"""Names from the outermost section to a field; items of a list have their number."""

_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_MOST = 100_000
"""Values that a text may hold, aliases written out: a few nested ones can stand for billions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a text says, and where."""

    values: Any
    lines: dict[Key, int] = field(default_factory=dict)
    """Line of every key, from 1."""
    texts: dict[Key, str] = field(default_factory=dict)
    """What was written for every scalar: `007`, where YAML reads the number 7. A written null has
    none; nothing at all, which YAML reads as null too, is an empty text."""


def read_yaml(text: str, at: Callable[[int | None], str]) -> Written:
    """Read one document.

    Args:
        text: YAML.
        at: what an error begins with: the place of a line, or of no line in particular.

    Raises:
        ConfigError: not YAML, a key that is given twice or is no scalar, an alias within what it
            stands for; with the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Written(values=None)
        written = Written(values=None)
        for path, line, scalar in _walk(node, at):
            written.lines.setdefault(path, line)
            if scalar is not None:
                written.texts.setdefault(path, scalar)
        return Written(
            values=loader.construct_document(node), lines=written.lines, texts=written.texts
        )
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{at(line)}: the character {chr(error.character)!r} is not allowed in YAML"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line_or_none = mark.line + 1 if mark else None
        says = ": ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces, not tabs" if r"'\t'" in says else ""
        if "scanning an alias" in says:
            hint = "; a text that begins with * stands in quotes"
        raise ConfigError(f"{at(line_or_none)}: {says or 'not valid YAML'}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{at(None)}: nested too deep") from None


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct as YAML does; an error of a scalar (month 13) gets its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"'{node.value[:40]}' is not a valid {kind}", node.start_mark
            ) from None


def _walk(
    root: yaml.Node, at: Callable[[int | None], str]
) -> Iterator[tuple[Key, int, str | None]]:
    """Yield every key below a node: path, line, and the text of a scalar."""
    count = 0
    open_nodes: set[int] = set()

    def below(node: yaml.Node, path: Key) -> Iterator[tuple[Key, int, str | None]]:
        nonlocal count
        count += 1
        if count > _MOST:
            raise ConfigError(f"{at(None)}: stands for more than {_MOST} values; use fewer aliases")
        if id(node) in open_nodes:
            raise ConfigError(f"{at(_line(node))}: an alias stands within what it stands for")
        open_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield from _pairs(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from below_key(item, (*path, str(index)), _line(item))
        open_nodes.remove(id(node))

    def below_key(node: yaml.Node, path: Key, line: int) -> Iterator[tuple[Key, int, str | None]]:
        plain = isinstance(node, yaml.ScalarNode) and (node.tag != _NULL or not node.value)
        yield path, line, node.value if plain else None
        yield from below(node, path)

    def _pairs(node: yaml.MappingNode, path: Key) -> Iterator[tuple[Key, int, str | None]]:
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            name = _name(key, at)
            if name in first:
                raise ConfigError(
                    f"{at(_line(key))}: '{'.'.join((*path, name))}' is given twice, first in "
                    f"line {first[name]}; put the two together into one"
                )
            first[name] = _line(key)
            if key.tag == _MERGE:
                merged.append(value)
            else:
                yield from below_key(value, (*path, name), _line(key))
        for value in merged:  # last: what stands here itself goes before what is merged in
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for part in parts:
                yield from below(part, path)

    yield from below(root, ())


def _name(key: yaml.Node, at: Callable[[int | None], str]) -> str:
    """Return a key's text: names are texts, and `on` is one."""
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigError(f"{at(_line(key))}: a key is a plain text")
    if key.tag != _MERGE:
        key.tag = _TEXT
    return str(key.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
