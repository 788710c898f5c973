"""Blocks of the cache: whatever is done to slots, each keeps what it has and no block is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.native.cache import Blocks

SLOTS, BLOCK, CONTEXT, COUNT = 5, 4, 23, 16


class Cache(RuleBasedStateMachine):
    """Slots as lists of what was written at their positions, beside a memory in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(COUNT, BLOCK, SLOTS, CONTEXT)
        self.memory = np.full((COUNT, BLOCK), -1)
        self.slots: list[list[int]] = []
        self.longest: list[int] = []
        self.owned: list[int] = []
        self.written = 0

    def write(self, slot: int, positions: int) -> None:
        self.blocks.grow(slot, positions)
        for position in range(len(self.slots[slot]), positions):
            self.written += 1
            block = self.blocks.table[slot, position // BLOCK]
            self.memory[block, position % BLOCK] = self.written
            self.slots[slot].append(self.written)

    @precondition(lambda self: len(self.slots) < SLOTS)
    @rule(length=st.integers(1, CONTEXT - 1), data=st.data())
    def begin(self, length: int, data: st.DataObject) -> None:
        longest = data.draw(st.integers(length, CONTEXT))
        source, shared = 0, 0
        if self.slots:
            source = data.draw(st.integers(0, len(self.slots) - 1))
            shared = data.draw(st.integers(0, min(length - 1, len(self.slots[source]))))
        owned = int(self.blocks.of(longest)) - shared // BLOCK
        if not self.blocks.fits(owned, self.owned):
            return
        slot = len(self.slots)
        self.slots.append(self.slots[source][:shared] if shared else [])
        self.longest.append(longest)
        self.owned.append(owned)
        if shared and (copy := self.blocks.share(source, slot, shared)):
            old, new, count = copy
            self.memory[new, :count] = self.memory[old, :count]
        self.write(slot, length)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """Never beyond what there is room for: a slot that has begun is never stopped."""
        slot = data.draw(st.integers(0, len(self.slots) - 1))
        self.write(slot, data.draw(st.integers(len(self.slots[slot]), self.longest[slot])))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        slot, last = data.draw(st.integers(0, len(self.slots) - 1)), len(self.slots) - 1
        for column in (self.slots, self.longest, self.owned):
            column[slot] = column[last]  # type: ignore[index]
            column.pop()  # type: ignore[attr-defined]
        if slot == last:
            self.blocks.clear(slot)
        else:
            self.blocks.move(last, slot)

    @invariant()
    def every_slot_reads_what_it_wrote(self) -> None:
        for slot, expected in enumerate(self.slots):
            places = np.arange(len(expected))
            blocks = self.blocks.table[slot, places // BLOCK]
            assert self.memory[blocks, places % BLOCK].tolist() == expected

    @invariant()
    def no_block_is_lost(self) -> None:
        used = {
            block
            for slot in range(len(self.slots))
            for block in self.blocks.table[slot, : self.blocks.counts[slot]].tolist()
        }
        assert len(used) + self.blocks.free == COUNT
        assert self.blocks.peak >= len(used)


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_full_cache_is_an_error_and_the_lowest_block_is_taken_first() -> None:
    blocks = Blocks(3, 4, 2, 12)
    blocks.grow(0, 4)
    blocks.grow(1, 8)
    with pytest.raises(ValueError, match="is full"):
        blocks.grow(0, 8)
    blocks.clear(1)
    blocks.grow(0, 8)
    assert blocks.table[0, :2].tolist() == [0, 1] and blocks.peak == 3
