"""The requests that are being sampled, side by side in columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.wire.trajectory import RolloutRequest


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request without a slot."""

    request: RolloutRequest
    limit: int
    """Longest response."""
    uniforms: np.ndarray
    """float64 ``[limit or more]``, one for each token that may be drawn."""
    adapter: int
    """Index in `CachedDecoder.adapters`."""


class Slots:
    """The requests that are being sampled; slots in use are 0 .. S - 1.

    Nothing here is done token by token in Python, which would take longer than the attention.
    Operations on all slots are few, because the forward leaves nothing of Python in the processor's
    caches, so that each costs many times what it does in a loop of its own.
    """

    def __init__(self, slots: int, context: int, *, filters: bool = False) -> None:
        """With `filters`, tokens are drawn from less than the whole distribution."""
        self.requests: list[RolloutRequest] = []
        # [slots, context]. All but the first are one memory with the flat views below: filled,
        # never replaced.
        self.prompts = np.zeros((slots, context), dtype=np.int32)
        self.tokens = np.zeros((slots, context), dtype=np.int64)
        """Responses so far."""
        self.logprobs = np.zeros((slots, context), dtype=np.float32)
        """Of each token when it was drawn."""
        self.unfiltered = np.zeros((slots, context), dtype=np.float32) if filters else None
        """Likewise, of the whole distribution; None where that is what tokens are drawn from."""
        self.uniforms = np.zeros((slots, context))
        """float64, for each token that may be drawn."""
        # int64 [slots]
        self.lengths = np.zeros(slots, dtype=np.int64)
        """Prompt tokens."""
        self.filled = np.zeros(slots, dtype=np.int64)
        """Positions in the cache after the step that is being planned."""
        self.counts = np.zeros(slots, dtype=np.int64)
        """Response tokens."""
        self.limits = np.zeros(slots, dtype=np.int64)
        """Longest response."""
        self.adapters = np.zeros(slots, dtype=np.int64)
        """Index in `CachedDecoder.adapters`."""
        self.reserved = np.zeros(slots, dtype=np.int64)
        """Blocks of the cache that the longest response takes, beside what it shares."""
        self.newest = np.zeros(slots, dtype=np.int64)
        """The token that the step in planning computes from."""
        self._first = np.arange(slots) * context
        """A slot's first cell in the flat views."""
        self._tokens, self._logprobs = self.tokens.reshape(-1), self.logprobs.reshape(-1)
        self._uniforms = self.uniforms.reshape(-1)
        self._columns: list[np.ndarray] = [self.prompts, self.tokens, self.logprobs, self.uniforms]
        if self.unfiltered is not None:
            self._columns.append(self.unfiltered)
            self._unfiltered = self.unfiltered.reshape(-1)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, waiting: Waiting, reserved: int) -> int:
        """Give a request a slot, and return which; `reserved` as in the column of this name."""
        slot, prompt = len(self), waiting.request.prompt_ids
        self.requests.append(waiting.request)
        self.prompts[slot, : len(prompt)] = prompt
        self.uniforms[slot, : len(waiting.uniforms)] = waiting.uniforms
        self.lengths[slot], self.limits[slot] = len(prompt), waiting.limit
        self.filled[slot] = self.counts[slot] = 0
        self.adapters[slot], self.reserved[slot] = waiting.adapter, reserved
        return slot

    def remove(self, slot: int) -> bool:
        """Empty a slot; return whether the last one in use has moved into it."""
        last = len(self) - 1
        request = self.requests.pop()
        if slot == last:
            return False
        self.requests[slot] = request
        for column in self._columns:
            column[slot] = column[last]
        rows = self.lengths, self.filled, self.counts, self.limits, self.adapters
        for row in (*rows, self.reserved, self.newest):
            row[slot] = row[last]
        return True

    def cells(self, slots: np.ndarray | slice) -> np.ndarray:
        """Where the next token of each of these slots belongs, int64.

        The places are those of `tokens`, `logprobs` and `uniforms` as flat arrays.
        """
        cells: np.ndarray = self._first[slots] + self.counts[slots]
        return cells

    def uniforms_at(self, cells: np.ndarray) -> np.ndarray:
        """Uniforms of these cells, float64."""
        return self._uniforms.take(cells)

    def record(
        self,
        slots: np.ndarray | slice,
        cells: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        unfiltered: np.ndarray,
    ) -> None:
        """Store the next token of slots, and its log-probability."""
        self._tokens[cells] = tokens
        self._logprobs[cells] = logprobs
        if self.unfiltered is not None:
            self._unfiltered[cells] = unfiltered
        self.counts[slots] += 1
        self.newest[slots] = tokens
