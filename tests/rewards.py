"""Reward functions that tests name in their configurations."""

from __future__ import annotations

import math


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """Characters of each response."""
    return [float(len(response)) for response in responses]


def one(prompts: list[str], responses: list[str]) -> list[float]:
    """A constant."""
    return [1.0] * len(responses)


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    """Broken."""
    return [math.nan] * len(responses)
