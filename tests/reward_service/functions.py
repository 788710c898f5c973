"""Reward functions, good and broken, that the tests of this folder name as targets."""

from __future__ import annotations

from collections.abc import Iterator

VALUE = 3
CALLS: list[tuple[list[str], list[str]]] = []


def spelled(prompts: list[str], responses: list[str]) -> list[float]:
    """The number that each response spells."""
    return [float(response) for response in responses]


def lengths(prompts: list[str], responses: list[str]) -> Iterator[int]:
    """Prompt and response lengths as one integer, lazily."""
    return (100 * len(p) + len(r) for p, r in zip(prompts, responses, strict=True))


def recorded(prompts: list[str], responses: list[str]) -> list[float]:
    """Notes each call in CALLS."""
    CALLS.append((prompts, responses))
    return [0.0] * len(responses)


def one_short(prompts: list[str], responses: list[str]) -> list[float]:
    """A score too few."""
    return [1.0] * (len(responses) - 1)


def nothing(prompts: list[str], responses: list[str]) -> None:
    """Forgot its return."""


def raising(prompts: list[str], responses: list[str]) -> list[float]:
    """Fails."""
    raise KeyError("score")


def second_is_nan(prompts: list[str], responses: list[str]) -> list[float]:
    """NaN in the midst of numbers."""
    return [float("nan") if i == 1 else 1.0 for i in range(len(responses))]


def infinite(prompts: list[str], responses: list[str]) -> list[float]:
    """Not finite."""
    return [float("inf")] * len(responses)


def none_each(prompts: list[str], responses: list[str]) -> list[None]:
    """None for a score."""
    return [None] * len(responses)


def words(prompts: list[str], responses: list[str]) -> list[str]:
    """Words for scores."""
    return ["good"] * len(responses)


def beyond_float(prompts: list[str], responses: list[str]) -> list[int]:
    """An integer that no float holds."""
    return [10**400] * len(responses)


def beyond_float32(prompts: list[str], responses: list[str]) -> list[float]:
    """A finite double that is infinite on the wire."""
    return [1e300] * len(responses)
