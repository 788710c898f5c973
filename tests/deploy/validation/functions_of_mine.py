"""A user's module, for recipes that name something in it."""

from __future__ import annotations


def good(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0 for _ in responses]


def other_arguments(prompts: list[str], responses: list[str], more: int) -> list[float]:
    return [0.0 for _ in responses]
