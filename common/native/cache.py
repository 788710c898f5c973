"""Which blocks of the cache hold the keys and values of which slots.

A block has room for some positions of one slot, in all layers. Slots take blocks as they grow, and
what several have in common they hold once (PagedAttention: Kwon 2023, sections 4.1 and 4.4).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


class Blocks:
    """The blocks of a cache, and the table of what every slot has.

    The lowest free block is taken first: what a cache has touched of its memory is then what it
    needed at once, and not more.
    """

    def __init__(self, blocks: int, block: int, slots: int, context: int) -> None:
        """`blocks` of `block` positions each, for slots of at most `context` positions."""
        self.block = block
        self.table = np.zeros((slots, -(-context // block)), dtype=np.int32)
        """The blocks of each slot in order of positions; what is behind `counts` means nothing."""
        self.counts = np.zeros(slots, dtype=np.int64)
        """Blocks of each slot."""
        self.taken = np.zeros(slots, dtype=np.int64)
        """Those that it took, and did not begin by sharing."""
        self.peak = 0
        """Most blocks that were in use at once."""
        self._users = np.zeros(blocks, dtype=np.int64)
        self._free = list(range(blocks))

    @property
    def free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def of(self, positions: int | np.ndarray) -> int | np.ndarray:
        """Return how many blocks so many positions take."""
        return -(-positions // self.block)

    def grow(self, slot: int, positions: int) -> None:
        """Have blocks for the first positions of a slot.

        Raises:
            ValueError: none is free.
        """
        count = int(self.of(positions))
        while self.counts[slot] < count:
            if not self._free:
                raise ValueError("the cache of keys and values is full")
            self.table[slot, self.counts[slot]] = lowest = heapq.heappop(self._free)
            self._users[lowest] = 1
            self.counts[slot] += 1
            self.taken[slot] += 1
        self.peak = max(self.peak, len(self._users) - len(self._free))

    def grow_all(self, positions: np.ndarray) -> None:
        """Have blocks for the first positions of slots 0, 1, 2, ..."""
        behind = self.of(positions) > self.counts[: len(positions)]
        for slot in np.flatnonzero(behind).tolist():
            self.grow(slot, int(positions[slot]))

    def share(self, source: int, target: int, positions: int) -> tuple[int, int, int] | None:
        """Give an empty slot the first positions of another.

        Returns:
            The source's block, the target's, and how many positions have to be copied between
            them: what does not fill a block. None where all do.
        """
        whole, rest = divmod(positions, self.block)
        shared = self.table[source, :whole]
        self.table[target, :whole] = shared
        self._users[shared] += 1
        self.counts[target] = whole
        self.taken[target] = 0
        if not rest:
            return None
        self.grow(target, positions)
        return int(self.table[source, whole]), int(self.table[target, whole]), rest

    def clear(self, slot: int) -> None:
        """Empty a slot; blocks that no other uses are free again."""
        for block in self.table[slot, : self.counts[slot]].tolist():
            self._users[block] -= 1
            if not self._users[block]:
                heapq.heappush(self._free, block)
        self.counts[slot] = self.taken[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Give a slot what another one has, which is empty then."""
        self.clear(target)
        for column in (self.table, self.counts, self.taken):
            column[target] = column[source]
        self.counts[source] = self.taken[source] = 0

    def fits(self, wanted: int, reserved: Sequence[int] | np.ndarray) -> bool:
        """Whether a slot that takes up to `wanted` blocks can begin beside others.

        Args:
            wanted: blocks, without those that it will share.
            reserved: likewise of slots 0, 1, 2, ...
        """
        owing = np.maximum(np.asarray(reserved) - self.taken[: len(reserved)], 0).sum()
        return wanted <= self.free - int(owing)
