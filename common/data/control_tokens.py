r"""Control tokens: what only a chat template may write, and how it is kept so.

A tokenizer finds its added tokens in any text, whoever wrote it. Here it gets a second vocabulary,
in which each control token has a name that nobody can guess:

    <|im_end|>  ->  \U000f0000, 16 random hex digits, ".", a number, \U000f0001

What users write is then text, whatever it spells, also where the model of the tokenizer itself has
a control token in its vocabulary (Unigram, sentencepiece). Only `ChatTemplate` writes the names.
Ids do not depend on them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
_MARKS: Final = range(0xE000, 0xF900)
"""Private-use characters; one that a conversation does not hold marks what users wrote."""


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """The control tokens of a tokenizer."""

    special: frozenset[str]
    """Only the template writes them."""
    shared: frozenset[str]
    """The model may write them too: ``<think>``, ``<tool_call>``."""
    names: Mapping[str, str] = field(init=False)
    """The secret name of each."""

    def __post_init__(self) -> None:
        nonce = secrets.token_hex(8)
        names = {
            token: f"{_OPEN}{nonce}.{number}{_CLOSE}"
            for number, token in enumerate(sorted(self.special | self.shared))
        }
        object.__setattr__(self, "names", names)

    @cached_property
    def name(self) -> re.Pattern[str]:
        """Any of the names."""
        return _any_of(self.names.values())

    def renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tokenizer.json in which the control tokens have their secret names."""
        return _renamed(values, self.names)

    def named(self, text: str, mark: str) -> str:
        """Return a rendered text with names for its control tokens, and without marks."""
        # No mark fits inside a token of one character: one that a mark stands before is text.
        parts = (f"(?<!{mark}){p}" if len(t) == 1 else p for t, p in self._patterns)
        pattern = "|".join(parts) or "(?!)"
        text = re.sub(pattern, lambda found: self.names[found[0]], text)
        return text.replace(mark, "").replace(_escaped(mark), "")

    def spelled(self, text: str) -> str:
        """Return a text with the tokens as they are spelled instead of their names."""
        spelling = {name: token for token, name in self.names.items()}
        return self.name.sub(lambda found: spelling[found[0]], text)

    def guarded(self, value: Any, mark: str, *, model: bool) -> Any:
        """Mark the control tokens in what a user (or the model) wrote, inside lists and mappings.

        A mark stands between all characters of a token, in either case of letters.
        """
        pattern = self._closed_in_text if model else self._spelled_in_text
        return _mapped(value, lambda text: pattern.sub(lambda f: mark + mark.join(f[0]), text))

    def framed(self, text: str, mark: str) -> str:
        """Mark the ends of a text that could be part of a control token with what is around it.

        The marks stand inside the blanks around the text, which a template may trim.
        """
        core = text.strip()
        inside = len(core) < self._longest and any(core in token for token in self.names)
        sizes = range(1, min(len(core), self._longest) + 1)
        before = mark if inside or any(core[:size] in self._ends for size in sizes) else ""
        after = mark if inside or any(core[-size:] in self._beginnings for size in sizes) else ""
        if not core or not (before or after):
            return text
        at = text.index(core)
        return text[:at] + before + core + after + text[at + len(core) :]

    @cached_property
    def _patterns(self) -> list[tuple[str, str]]:
        return [(token, re.escape(token)) for token in _longest_first(self.names)]

    @cached_property
    def _spelled_in_text(self) -> re.Pattern[str]:
        return re.compile(_any_of(self.names).pattern, re.IGNORECASE)

    @cached_property
    def _closed_in_text(self) -> re.Pattern[str]:
        return re.compile(_any_of(self.special).pattern, re.IGNORECASE)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.names), default=0)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(token[:end] for token in self.names for end in range(1, len(token)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(token[begin:] for token in self.names for begin in range(1, len(token)))


def unused_mark(*texts: str) -> str:
    """Return a private-use character that none of the texts holds, as it is or escaped."""
    return next(
        mark
        for mark in map(chr, _MARKS)
        if not any(mark in text or _escaped(mark) in text for text in texts)
    )


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match any of them, the longest first; nothing when there are none."""
    return re.compile("|".join(map(re.escape, _longest_first(tokens))) or "(?!)")


def _longest_first(tokens: Iterable[str]) -> list[str]:
    return sorted(tokens, key=lambda token: (-len(token), token))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text inside a JSON value, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_mapped(inner, change) for inner in value]
    return value


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename tokens wherever a tokenizer.json has them; ids stay."""
    clean = deepcopy(dict(values))
    clean["post_processor"] = None  # it names tokens, and what it adds is added elsewhere
    for token in clean["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = clean["model"]
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(token, token): place for token, place in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not _makes(m, names)]
    return clean


def _makes(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    """Whether a merge is made of renamed tokens, or makes one."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
