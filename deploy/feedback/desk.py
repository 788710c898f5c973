"""A round as its labelers meet it: the next pair, an answer, an undo; no web in it.

One thread owns it: SQLite's objects are not shared, and what people do is short.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Final

from common.data.chat import Message
from common.errors import DataError
from deploy.feedback.answers import STEPS
from deploy.feedback.asking import Refused, Task
from deploy.feedback.pairs import Pair, read_pairs
from deploy.feedback.store import Store

_MOST_WORDS: Final = 400
"""Longer texts are not marked where they differ: that takes the square of their length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A response as it is shown: pieces of text, and whether the other side lacks them."""

    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a labeler sees: nothing of policies, scores, other people or what is known."""

    key: str
    prompt: str
    messages: Sequence[Message]
    left: Side
    right: Side
    answered: int
    """By this labeler."""
    last: int
    """Number of the answer that an undo takes back; 0 where there is none."""


class Desk:
    """One round."""

    def __init__(self, pairs: Path, answers: Path, lease_s: float) -> None:
        """Open a round.

        Raises:
            DataError: a file of it is missing or damaged.
        """
        self._pairs: dict[str, Pair] = {pair.uid: pair for pair in read_pairs(pairs)}
        self.store = Store(answers, lease_s=lease_s)
        if self.store.asked() != self._pairs.keys():
            self.store.close()
            raise DataError(f"{answers}: is of other pairs than {pairs}; put both back together")

    def close(self) -> None:
        """Close its files."""
        self.store.close()

    def shown(self, labeler: str) -> Shown | None:
        """Return what a labeler is asked now; None where nothing is left for him."""
        self.store.welcome(labeler)
        task = self.store.next_task(labeler)
        return None if task is None else self._shown(labeler, task)

    def _shown(self, labeler: str, task: Task) -> Shown:
        pair = self._pairs[task.pair_uid]
        texts = (pair.first.text, pair.second.text)
        left, right = marked(*(texts if task.first_is_left else texts[::-1]))
        answered = self.store.answered(labeler)
        return Shown(
            key=task.key,
            prompt=pair.prompt,
            messages=pair.messages,
            left=left,
            right=right,
            answered=answered,
            last=self.store.last_number(labeler),
        )


def marked(left: str, right: str) -> tuple[Side, Side]:
    """Return both texts in pieces, marked where the other one has other words."""
    one, two = _words(left), _words(right)
    if max(len(one), len(two)) > _MOST_WORDS:
        return Side(pieces=[(left, False)]), Side(pieces=[(right, False)])
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, of, begin, end in ((sides[0], one, a, b), (sides[1], two, c, d)):
            if begin < end:
                side.append(("".join(of[begin:end]), kind != "equal"))
    return Side(pieces=sides[0]), Side(pieces=sides[1])


def _words(text: str) -> list[str]:
    """Cut a text into words, each with the space behind it; joined they are the text."""
    return re.findall(r"\s*\S+\s*|\s+", text)


def step_of(text: str) -> int | None:
    """Return the step that a form names; None where it skips the pair.

    Raises:
        Refused: it names none.
    """
    if text == "skip":
        return None
    if text not in map(str, range(len(STEPS))):
        raise Refused("choose one of the seven answers, or skip")
    return int(text)
