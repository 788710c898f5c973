"""What the prompts of `instruct` are about: requests made from a small grammar."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from common.randomness import derive_seed

FORMS: Final = (
    "Write about {}.",
    "Write a short note about {}.",
    "Write a few sentences about {}.",
    "Write a short story about {}.",
    "Write a message to a friend about {}.",
    "Write a diary entry about {}.",
    "Describe {}.",
    "Tell me about {}.",
    "Say something kind about {}.",
    "What is special about {}?",
)
_WORDS = re.compile(r"\w+").findall
THINGS: Final = tuple(
    _WORDS(
        "apple bakery balloon beach bicycle bird boat book bridge cake camera candle castle cat "
        "chair city clock cloud cup dog doctor farm festival field fire fish flower forest garden "
        "guitar harbor hat hill horse house island journey kitchen lake library lighthouse "
        "market meal mirror moon mountain museum ocean painter park piano picnic poem river "
        "road school ship snowman song star street summer teacher toy train tree village walk "
        "window winter"
    )
)
MANNERS: Final = tuple(_WORDS("old small quiet busy strange happy lonely famous new lost"))
PLACES: Final = (
    "",
    " by the sea",
    " in the rain",
    " at night",
    " in spring",
    " from my childhood",
    " far from home",
    " in a dream",
)


def split_things(seed: int, share: float) -> tuple[list[str], list[str]]:
    """Split the things into (train, held out); a request of one side has no thing of the other."""
    order = np.random.default_rng(derive_seed(seed, "things")).permutation(len(THINGS))
    held_out = {THINGS[i] for i in order[: round(share * len(THINGS))]}
    return [t for t in THINGS if t not in held_out], [t for t in THINGS if t in held_out]


def draw_request(things: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Draw a request about one of the things; returns it, and what it is about."""
    form, thing, manner, place = (
        options[int(rng.integers(len(options)))] for options in (FORMS, things, MANNERS, PLACES)
    )
    article = "an" if manner[0] in "aeiou" else "a"
    return form.format(f"{article} {manner} {thing}{place}"), f"{manner} {thing}"
