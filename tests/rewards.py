"""Reward functions that tests name in their configurations."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence

from reward_service.samples import Sample, Score


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """Characters of each response."""
    return [float(len(response)) for response in responses]


def one(prompts: list[str], responses: list[str]) -> list[float]:
    """A constant."""
    return [1.0] * len(responses)


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """How often a response has the letter that its prompt asks for in quotes."""
    wanted = [prompt.partition("'")[2][:1] for prompt in prompts]
    return [float(r.count(w)) if w else -1.0 for w, r in zip(wanted, responses, strict=True)]


def of_parts(samples: Sequence[Sample]) -> list[Score]:
    """The length, and what it is made of."""
    return [
        Score(value=len(s.response), parts={"letters": len(s.response), "two words": 2.0})
        for s in samples
    ]


def of_source(samples: Sequence[Sample]) -> list[float]:
    """Characters in the name of the source."""
    return [float(len(s.source)) for s in samples]


def flat_for_even_numbers(prompts: list[str], responses: list[str]) -> list[float]:
    """One score for all responses to a prompt that ends with an even number; else what they say."""
    return [
        zlib.crc32(response.encode()) % 97 / 97 if int(prompt.split()[-1][:-1]) % 2 else 0.5
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    """Broken."""
    return [math.nan] * len(responses)


def by_number(prompts: list[str], responses: list[str]) -> list[float]:
    """Solved always, never, or as it comes, by the number that a prompt ends with."""
    kinds = [int(prompt.split()[-1][:-1]) % 3 for prompt in prompts]
    return [
        float(kind == 0 or (kind == 2 and zlib.crc32(response.encode()) % 2))
        for kind, response in zip(kinds, responses, strict=True)
    ]


def a_tenth_is_given_up(samples: Sequence[Sample]) -> list[float]:
    """As `by_number`; every tenth answer takes too much memory, which costs it its score."""
    (sample,) = samples
    if zlib.crc32(f"{sample.prompt}{sample.response}".encode()) % 10 == 0:
        raise MemoryError
    return by_number([sample.prompt], [sample.response])


def in_a_minute(prompts: list[str], responses: list[str]) -> list[float]:
    """The length, after nearly a minute."""
    time.sleep(57.0)
    return length(prompts, responses)
