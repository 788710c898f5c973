"""Demonstrations and comparisons in tokens, as the supervised stages are given them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """A demonstration in tokens."""

    prompt: list[int]
    response: list[int]
    """EOS included."""


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
