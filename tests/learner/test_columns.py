"""Examples as columns are the examples, and travel without a copy of their tokens."""

from __future__ import annotations

import pickle  # what Ray does; nothing that others made is loaded
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.supervised.columns import Columns, Drawn, columns, lengths_of
from learner.supervised.examples import EncodedComparison, EncodedPair
from learner.supervised.packing import pack

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=9)
spans = st.lists(st.integers(0, 99), unique=True, max_size=6).map(
    lambda ends: tuple(pairwise(sorted(ends)))[::2]
)
pairs = st.builds(EncodedPair, prompt=tokens, response=tokens, between=spans)
comparisons = st.builds(
    EncodedComparison,
    prompt=tokens,
    chosen=tokens,
    rejected=tokens,
    confidence=st.floats(0.5, 1.0),
    split=st.text(max_size=3),
)


@given(st.lists(pairs), st.lists(comparisons))
def test_a_row_is_the_example(
    demonstrations: list[EncodedPair], preferences: list[EncodedComparison]
) -> None:
    assert list(columns(EncodedPair, demonstrations)) == demonstrations
    assert list(columns(EncodedComparison, preferences)) == preferences


@given(st.lists(pairs, min_size=1), st.data())
def test_parts_and_orders_are_those_of_a_list(
    examples: list[EncodedPair], data: st.DataObject
) -> None:
    made = columns(EncodedPair, examples)
    begin, end = (data.draw(st.integers(-9, 9)) for _ in range(2))
    assert list(made[begin:end]) == examples[begin:end]
    assert list(made[begin:end][::-2]) == examples[begin:end][::-2]
    again: Sequence[EncodedPair] = pickle.loads(pickle.dumps(made[begin:end]))
    assert list(again) == examples[begin:end]
    order = data.draw(st.lists(st.integers(0, len(examples) - 1)))
    drawn: Sequence[EncodedPair] = Drawn(made, order)
    assert list(drawn) == [examples[i] for i in order]
    assert list(drawn[1:]) == [examples[i] for i in order[1:]]
    assert pack(drawn, 20) == pack([examples[i] for i in order], 20)
    assert made[-1] == examples[-1]
    with pytest.raises(IndexError):
        made[len(examples)]


def test_tokens_travel_beside_and_are_not_copied() -> None:
    made = columns(EncodedPair, [EncodedPair(prompt=[7] * 5000, response=[8] * 5000)] * 20)
    beside: list[pickle.PickleBuffer] = []
    travelled = pickle.dumps(made, protocol=5, buffer_callback=beside.append)
    assert len(travelled) < 20_000
    assert sum(buffer.raw().nbytes for buffer in beside) >= 20 * 10_000 * 4
    received: Columns[EncodedPair] = pickle.loads(travelled, buffers=beside)
    values, given = (x._table["prompt"].chunk(0).values.buffers()[1] for x in (received, made))
    assert values.address == given.address
    assert received[19] == made[0]


def test_a_comparison_takes_both_sides_padded_to_the_longer_one() -> None:
    found = EncodedComparison(prompt=[1, 2], chosen=[3], rejected=[4, 5, 6], confidence=1.0)
    assert dict(lengths_of([found, found], [1])) == {1: 10}
