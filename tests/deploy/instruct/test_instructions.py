"""What is said in a prompt is read back out of it: every kind, phrasing, number and combination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.instruct.instructions import (
    HELD_OUT,
    KINDS,
    TRAINED,
    Instruction,
    compatible,
    draw,
    read,
    say,
)


def every(kind: str) -> list[Instruction]:
    """All instructions of a kind."""
    numbers, texts = KINDS[kind].numbers or (0,), KINDS[kind].texts or ("",)
    return [Instruction(kind, n, t) for n, t in itertools.product(numbers, texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_phrasing_is_read_as_what_was_said(kind: str) -> None:
    for instruction in every(kind):
        for phrasing, spelt in itertools.product(range(len(KINDS[kind].phrasings)), (False, True)):
            said = say(instruction, phrasing, spelt=spelt)
            assert read(said) == (instruction,)
            for prompt in (
                f"Write about a dog. {said}",
                f"{said}\nWrite about a dog.",
                f"<|im_start|>user\nWrite about a dog. {said}<|im_end|>\n<|im_start|>assistant\n",
            ):
                assert read(prompt) == (instruction,)


@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    joint=st.sampled_from([" ", "\n"]),
)
def test_combinations_are_read_in_their_order(kinds: list[str], seed: int, joint: str) -> None:
    rng = np.random.default_rng(seed)
    wanted = [draw(kind, rng) for kind in kinds]
    said = [say(i, int(rng.integers(9)), spelt=bool(rng.integers(2))) for i in wanted]
    assert read(joint.join(["Describe a small boat.", *said])) == tuple(wanted)


def test_other_texts_hold_none() -> None:
    assert read("Write about an old lighthouse by the sea. Use many words, and commas.") == ()


def test_every_kind_is_on_one_side() -> None:
    assert {*TRAINED} | {*HELD_OUT} == {*KINDS}
    assert not {*TRAINED} & {*HELD_OUT}
    assert all(len({*kind.phrasings}) == len(kind.phrasings) >= 2 for kind in KINDS.values())


def test_what_goes_together_goes_both_ways() -> None:
    for first, second in itertools.product(TRAINED, repeat=2):
        assert compatible(first, second) == compatible(second, first)
        assert not compatible(first, first)
