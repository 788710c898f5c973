"""What people said of pairs of responses: plain records, and how sure a word of theirs is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["answer", "skip"]
STEPS: Final = (
    "left much better",
    "left better",
    "left slightly better",
    "tie",
    "right slightly better",
    "right better",
    "right much better",
)
"""What a labeler chooses from, by keys 1 to 7."""
MOST: Final = len(STEPS) // 2
CONFIDENCE: Final = {0: 0.5, 1: 0.65, 2: 0.85, 3: 0.95}
"""How sure a preference is, by its size: a tie trains as an even label, as WebGPT's do (Nakano
2021, section 3.2); the others are our choice."""
REASONS: Final = ("cannot judge", "both unusable", "broken")
"""Why a pair is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A labeler's standing word on a pair: what was undone is none."""

    pair_uid: str
    labeler: str
    occasion: int = 0
    """0 for the first time that it was shown to this labeler, 1 for the second."""
    kind: Kind = "answer"
    preference: int | None = None
    """-3 ... 3, above 0 where the pair's first response is the better; None of a skip."""
    first_is_left: bool = True
    """On which side the first response was shown."""
    why: str = ""
    """What the labeler wrote; of a skip one of `REASONS` before it."""
    flagged: bool = False
    seconds: float = 0.0
    """From the showing to the answer, without breaks."""
    at: float = 0.0
    """Unix seconds at which it was stored."""

    @property
    def chose_left(self) -> bool | None:
        """Whether the left response was preferred; None of a tie and of a skip."""
        if not self.preference:
            return None
        return (self.preference > 0) == self.first_is_left


def preference_of(step: int, *, first_is_left: bool) -> int:
    """Return what a step on the screen says of the pair's first response.

    Args:
        step: 0 (left much better) ... 6 (right much better), as in `STEPS`.
        first_is_left: whether the pair's first response was shown on the left.

    Raises:
        ValueError: there is no such step.
    """
    if not 0 <= step < len(STEPS):
        raise ValueError(f"step {step}: there are {len(STEPS)}")
    return MOST - step if first_is_left else step - MOST


def of_kind(answers: Sequence[Answer], occasion: int = 0) -> list[Answer]:
    """Return the answers that prefer something, or nothing (a tie), of one occasion."""
    return [a for a in answers if a.kind == "answer" and a.occasion == occasion]
