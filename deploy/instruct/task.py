"""The task of `instruct`: prompts in chat form that ask for a text and say how it must be written.

Every prompt is a request about something and one to three instructions. Training sees some things,
the trained kinds and most of their combinations; held out are other things (`topics`), kinds that
training never asks for (`kinds`) and pairs of trained kinds that it never asks for together
(`combinations`), the latter two on the held-out things as well.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np

from common.config.quickstart import InstructConfig
from common.files import write_atomic
from common.randomness import derive_seed
from deploy.instruct.instructions import (
    HELD_OUT,
    TRAINED,
    Instruction,
    compatible,
    draw,
    say,
)
from deploy.instruct.topics import draw_request, split_things

Split = Literal["topics", "kinds", "combinations"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
Kinds = tuple[str, ...]
"""The kinds of one prompt's instructions."""

THINGS_HELD_OUT: Final = 0.3
PAIRS_HELD_OUT: Final = 0.2
SHARES: Final = (0.7, 0.22, 0.08)
"""Of prompts with one, two and three instructions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A prompt, and what it asks for."""

    text: str
    """What the user says."""
    instructions: tuple[Instruction, ...]
    about: str
    """What the text is to be about, in two words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All prompts; no text is on two sides."""

    train: list[Ask]
    held_out: dict[Split, list[Ask]]


def make_task(settings: InstructConfig, seed: int) -> Task:
    """Make the prompts; the same arguments give the same."""
    known, new = split_things(seed, THINGS_HELD_OUT)
    seen, unseen = split_pairs(seed)
    count = settings.held_out_prompts
    return Task(
        train=_asks(_mixed(settings.prompts, seen, seed, "train"), known, seed, "train"),
        held_out={
            "topics": _asks(_mixed(count, seen, seed, "topics"), new, seed, "topics"),
            "kinds": _asks(_cycled([(kind,) for kind in HELD_OUT], count), new, seed, "kinds"),
            "combinations": _asks(_cycled(unseen, count), new, seed, "combinations"),
        },
    )


def split_pairs(seed: int) -> tuple[list[Kinds], list[Kinds]]:
    """Split the compatible pairs of trained kinds into (seen in training, held out)."""
    pairs = [pair for pair in itertools.combinations(TRAINED, 2) if compatible(*pair)]
    order = np.random.default_rng(derive_seed(seed, "pairs")).permutation(len(pairs))
    held_out = {pairs[i] for i in order[: round(PAIRS_HELD_OUT * len(pairs))]}
    return [p for p in pairs if p not in held_out], [p for p in pairs if p in held_out]


def write_prompts(path: Path, texts: Sequence[str]) -> None:
    """Write what a user says as users write chat data, one conversation a line."""
    rows = ({"messages": [{"role": "user", "content": text}]} for text in texts)
    write_atomic(path, (json.dumps(row).encode() + b"\n" for row in rows))


def _mixed(count: int, pairs: Sequence[Kinds], seed: int, label: str) -> list[Kinds]:
    """Draw which kinds each of `count` prompts asks for; singles go round all trained kinds."""
    together = set(pairs)
    triples = [
        three
        for three in itertools.combinations(TRAINED, 3)
        if all(pair in together for pair in itertools.combinations(three, 2))
    ]
    rng = np.random.default_rng(derive_seed(seed, label, "kinds"))
    of_size = rng.choice(3, size=count, p=SHARES)
    singles = iter(_cycled([(kind,) for kind in TRAINED], count))
    drawn: list[Kinds] = []
    for size in of_size:
        options = (None, pairs, triples)[size]
        drawn.append(next(singles) if options is None else options[int(rng.integers(len(options)))])
    return drawn


def _cycled(options: Sequence[Kinds], count: int) -> list[Kinds]:
    return [options[i % len(options)] for i in range(count)]


def _asks(drawn: Sequence[Kinds], things: list[str], seed: int, label: str) -> list[Ask]:
    """Turn kinds into prompts, no two of them equal."""
    rng = np.random.default_rng(derive_seed(seed, label, "texts"))
    asks: dict[str, Ask] = {}
    for kinds in drawn:
        while (ask := _ask(kinds, things, rng)).text in asks:
            pass
        asks[ask.text] = ask
    return list(asks.values())


def _ask(kinds: Kinds, things: list[str], rng: np.random.Generator) -> Ask:
    """Say a request and its instructions, which stand after it or before it."""
    shuffled = [kinds[i] for i in rng.permutation(len(kinds))]
    instructions = tuple(draw(kind, rng) for kind in shuffled)
    said = [
        say(instruction, int(rng.integers(6)), spelt=bool(rng.random() < 0.5))
        for instruction in instructions
    ]
    request, about = draw_request(things, rng)
    before, line = rng.random(2)
    parts = [*said, request] if before < 0.2 else [request, *said]
    return Ask(
        text=("\n" if line < 0.3 else " ").join(parts), instructions=instructions, about=about
    )
