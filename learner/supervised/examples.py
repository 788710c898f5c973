"""Demonstrations and comparisons in tokens, as the supervised stages are given them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """A demonstration in tokens."""

    prompt: list[int]
    response: list[int]
    """What follows the prompt, EOS included."""
    between: tuple[tuple[int, int], ...] = ()
    """Spans of the response that are not learnt: what lies between the assistant's turns."""
    conversation: str = ""
    """The conversation that it is (a part of), by its uid."""

    @property
    def targets(self) -> int:
        """Tokens that are learnt."""
        return len(self.response) - sum(end - begin for begin, end in self.between)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedComparison:
    """A comparison in tokens."""

    prompt: list[int]
    chosen: list[int]
    """EOS included."""
    rejected: list[int]
    """EOS included."""
    confidence: float
    """Probability that `chosen` is the better one, 0.5 to 1."""
    split: str = ""
    """What it is for, as `common.data.records.Comparison.split`."""
