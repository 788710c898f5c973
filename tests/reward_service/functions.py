"""Reward functions, good and broken, that the tests of this folder name as targets."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from reward_service.samples import Sample, Score

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


def an_array(prompts: list[str], responses: list[str]) -> Any:
    """NumPy's numbers."""
    return np.arange(len(responses), dtype=np.float32)


def a_tensor(prompts: list[str], responses: list[str]) -> Any:
    """Torch's numbers, with a gradient that nobody wants."""
    return torch.arange(len(responses), dtype=torch.bfloat16, requires_grad=True)


def mixed(prompts: list[str], responses: list[str]) -> list[Any]:
    """Numbers of every type."""
    some = [True, Decimal("0.5"), Fraction(1, 4), np.float32(3), np.array(4), torch.tensor(5)]
    return some[: len(responses)]


async def coroutine(prompts: list[str], responses: list[str]) -> list[float]:
    """Async where nothing waits."""
    return [1.0] * len(responses)


def waiting(prompts: list[str], responses: list[str]) -> Any:
    """Hands out a promise."""
    return asyncio.Future(loop=asyncio.new_event_loop())


def knowing(samples: list[Sample]) -> list[float]:
    """1 for the answer that the data's column holds."""
    return [float(sample.response == sample.columns["answer"]) for sample in samples]


async def awaited(samples: list[Sample], patience: float = 0.0) -> list[Score]:
    """Asks several at once, and says more than a number."""

    async def one(sample: Sample) -> Score:
        await asyncio.sleep(patience)
        return Score(value=len(sample.response), parts={"group": sample.group}, reason="its length")

    return list(await asyncio.gather(*map(one, samples)))


def by_token(samples: list[Sample]) -> list[Score]:
    """1 on the first token of each response, and 2 for having ended."""
    return [
        Score(value=2.0 * s.finished, tokens=(1.0, *[0.0] * (len(s.tokens) - 1))) for s in samples
    ]


def a_token_short(samples: list[Sample]) -> list[Score]:
    """Forgot the token that ended it."""
    return [Score(value=0.0, tokens=(0.0,) * (len(sample.tokens) - 1)) for sample in samples]


def a_part_that_is_none(samples: list[Sample]) -> list[Score]:
    """A part that is no number."""
    return [Score(value=0.0, parts={"form": math.nan}) for _ in samples]


async def async_generator(prompts: list[str], responses: list[str]) -> AsyncIterator[float]:
    """Async, and one at a time."""
    for _ in responses:
        yield 1.0


def one_float(prompts: list[str], responses: list[str]) -> float:
    """A mean instead of numbers."""
    return 0.5


def one_numpy_number(prompts: list[str], responses: list[str]) -> Any:
    """A mean of NumPy's."""
    return np.mean([1.0, 2.0])


def a_point(prompts: list[str], responses: list[str]) -> Any:
    """A tensor of no dimension."""
    return torch.tensor(1.0)


def a_column(prompts: list[str], responses: list[str]) -> Any:
    """A reward model's output, not squeezed."""
    return np.zeros((len(responses), 1))


def a_dict(prompts: list[str], responses: list[str]) -> dict[str, float]:
    """Scores by response."""
    return dict.fromkeys(responses, 1.0)


def a_text(prompts: list[str], responses: list[str]) -> str:
    """As many characters as responses."""
    return "1" * len(responses)


def digits(prompts: list[str], responses: list[str]) -> list[str]:
    """Numbers as texts."""
    return ["1"] * len(responses)


def rows(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """A list for a score."""
    return [[0.5]] * len(responses)


def endless(prompts: list[str], responses: list[str]) -> Iterator[float]:
    """A generator that does not end."""
    while True:
        yield 1.0


def late(prompts: list[str], responses: list[str]) -> Iterator[float]:
    """A generator that fails on the way."""
    yield 1.0
    yield 1.0 / len(prompts[0])


def of_one(response: str) -> float:
    """Takes one response."""
    return 1.0


def of_three(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """Wants a column of its own."""
    return [1.0] * len(responses)


def wrong_inside(prompts: list[str], responses: list[str]) -> list[float]:
    """A TypeError of its own."""
    return [len(None) for _ in responses]  # type: ignore[arg-type]


def exits(prompts: list[str], responses: list[str]) -> list[float]:
    """Ends the program."""
    sys.exit(0)


def interrupts(prompts: list[str], responses: list[str]) -> list[float]:
    """Raises what Ctrl-C raises."""
    raise KeyboardInterrupt


def out_of_memory(prompts: list[str], responses: list[str]) -> list[float]:
    """Python's way to say it."""
    raise MemoryError


def out_of_gpu_memory(prompts: list[str], responses: list[str]) -> list[float]:
    """Torch's way to say it, on several lines."""
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")


def deep(prompts: list[str], responses: list[str]) -> list[float]:
    """Calls itself for ever."""
    return deep(prompts, responses)


def ends_its_process(prompts: list[str], responses: list[str]) -> list[float]:
    """What a crash in native code looks like."""
    os._exit(3)


def a_part_with_a_slash(samples: list[Sample]) -> list[Score]:
    """A part that is named as a group of metrics."""
    return [Score(value=0.0, parts={"form/case": 1.0}) for _ in samples]
