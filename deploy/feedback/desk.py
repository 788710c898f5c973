"""A round as its labelers meet it: the next pair, an answer, an undo; no web in it.

One thread owns it: SQLite's objects are not shared, and what people do is short.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final

from markupsafe import Markup

from common.errors import DataError
from common.run_folder import RoundFolder
from deploy.feedback.answers import STEPS
from deploy.feedback.asking import Refused, first_is_left
from deploy.feedback.markdown import rendered
from deploy.feedback.pairs import Pair, read_pairs
from deploy.feedback.store import Store

_COUNTED_FOR: Final = 500.0
"""How long a count of what is left is good for, in times of what it took: it looks at all pairs."""
_MOST_WORDS: Final = 400
"""Longer texts are not marked where they differ: that takes the square of their length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A text as it is shown."""

    pieces: Sequence[tuple[str, bool]]
    """Its parts, and whether the other side lacks them."""
    markup: Markup | None = None
    """The same as HTML, where Markdown is shown as such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a labeler sees: nothing of policies, scores, other people or what is known."""

    prompt: Piece
    messages: Sequence[tuple[str, Piece]]
    """Role and content; empty of a plain prompt."""
    left: Piece
    right: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A pair that a labeler is asked to answer."""

    key: str
    shown: Shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    """A pair to begin with, whose answer is told."""

    number: int
    """From 0."""
    of: int
    shown: Shown
    left_is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HowFar:
    """How far a labeler is, and the round."""

    answered: int
    """By this labeler."""
    pace: float | None
    """Median seconds of this labeler's last answers; None before the first."""
    share: float
    """Of the answers that are wanted of everybody, in tenths: finer steps would tell which pair is
    asked for another reason."""
    last: int
    """Number of the answer that an undo takes back; 0 where there is none."""
    last_said: str
    """What it said."""


class Desk:
    """One round."""

    def __init__(self, folder: RoundFolder, lease_s: float, *, markdown: bool = False) -> None:
        """Open a round.

        Raises:
            DataError: a file of it is missing or damaged.
        """
        self._pairs: dict[str, Pair] = {pair.uid: pair for pair in read_pairs(folder.pairs)}
        self._practice = read_pairs(folder.practice) if folder.practice.exists() else []
        self._markdown = markdown
        self.store = Store(folder.answers, lease_s=lease_s)
        if self.store.asked() != self._pairs.keys():
            self.store.close()
            raise DataError(
                f"{folder.answers}: is of other pairs than {folder.pairs}; put both back together"
            )
        self._wanted = self.store.wanted()
        self._counts, self._counted_until = (0, 0), 0.0

    def close(self) -> None:
        """Close its files."""
        self.store.close()

    def asked(self, labeler: str) -> Question | None:
        """Return what a labeler is asked now; None where nothing is left to ask."""
        self.store.welcome(labeler)
        task = self.store.next_task(labeler)
        if task is None:
            return None
        shown = self._shown(self._pairs[task.pair_uid], first_is_left=task.first_is_left)
        return Question(key=task.key, shown=shown)

    def practice(self, labeler: str) -> Practice | None:
        """Return the pair that a labeler practises with now; None after the last."""
        number = self.store.practised(labeler)
        if number >= len(self._practice):
            return None
        pair = self._practice[number]
        assert pair.gold is not None
        is_left = first_is_left(pair.uid, labeler, 0)
        return Practice(
            number=number,
            of=len(self._practice),
            shown=self._shown(pair, first_is_left=is_left),
            left_is_better=(pair.gold > 0) == is_left,
        )

    def progress(self, labeler: str) -> HowFar:
        """Return how far a labeler and the round are; a large round as it was a moment ago."""
        begin = time.monotonic()
        if begin > self._counted_until:
            self._counts = self.store.left(), self._wanted
            end = time.monotonic()
            self._counted_until = end + _COUNTED_FOR * (end - begin)
        left, wanted = self._counts
        return HowFar(
            answered=self.store.answered(labeler),
            pace=self.store.pace(labeler),
            share=(10 * (wanted - left) // wanted) / 10 if wanted else 1.0,
            last=self.store.last_number(labeler),
            last_said=self.store.last_said(labeler),
        )

    def _shown(self, pair: Pair, *, first_is_left: bool) -> Shown:
        texts = (pair.first.text, pair.second.text)
        pieces = marked(*(texts if first_is_left else texts[::-1]))
        left, right = (self._piece(of) for of in pieces)
        return Shown(
            prompt=self._piece([(pair.prompt, False)]),
            messages=[
                (message["role"], self._piece([(message.get("content") or "", False)]))
                for message in pair.messages
            ],
            left=left,
            right=right,
        )

    def _piece(self, pieces: Sequence[tuple[str, bool]]) -> Piece:
        text = "".join(part for part, _ in pieces)
        return Piece(pieces=pieces, markup=rendered(text) if self._markdown else None)


def marked(left: str, right: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return both texts in pieces, marked where the other one has other words."""
    one, two = _words(left), _words(right)
    if max(len(one), len(two)) > _MOST_WORDS:
        return [(left, False)], [(right, False)]
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, of, begin, end in ((sides[0], one, a, b), (sides[1], two, c, d)):
            if begin < end:
                side.append(("".join(of[begin:end]), kind != "equal"))
    return sides


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
