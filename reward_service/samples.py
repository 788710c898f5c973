"""What a reward function of the user's is given, and what it may return beside a number.

def score(samples: list[Sample]) -> list[float | Score]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A response, with all that is known of it. Example: `sample.columns["answer"]`."""

    prompt: str
    """As it was written; of a conversation, as its template wrote it."""
    response: str
    """Without the token that ended it."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else stood in the prompt's line of the data, by name."""
    source: str = ""
    """The source of the recipe's mixture that the prompt is of; empty without one."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The conversation that the response answers; empty for a plain text."""
    finished: bool = True
    """It ended by itself, not at the limit."""
    tokens: tuple[int, ...] = ()
    """The response's tokens, the one that ended it included."""
    group: int = 0
    """Equal for responses to one prompt within an iteration."""
    rollout_id: str = ""
    """Its name in logs and errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score with more to say. Example: `Score(value=1.0, parts={"truth": 1.0})`."""

    value: float
    """What the response is worth; a reward on its last token."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What it is made of, for metrics and the log; nothing is trained on them."""
    tokens: tuple[float, ...] | None = None
    """A reward on each token of the response, beside `value` (a process reward); as many as
    `Sample.tokens`."""
    reason: str = ""
    """Why, for the log."""

    @property
    def total(self) -> float:
        """The whole response's score: `value`, and those of its tokens."""
        return self.value + sum(self.tokens or ())
