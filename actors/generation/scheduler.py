"""Which tokens the next step computes: requests take free slots, prompts are cut into chunks."""

from __future__ import annotations

from collections import deque

import numpy as np

from actors.generation.forward import Chunk, Copy
from actors.generation.slots import Slots, Waiting

_WORTH_SHARING = 8
"""Shorter common prefixes cost more to find than to compute again."""


class Scheduler:
    """The requests that wait for a slot, and the plan of every step."""

    def __init__(self, slots: Slots, size: int, prefill_tokens: int) -> None:
        """`size` slots at most, and so many prompt tokens in a step."""
        self.queue: deque[Waiting] = deque()
        self.prefilling = False
        """A slot is in the middle of its prompt."""
        self._slots, self._size, self._prefill_tokens = slots, size, prefill_tokens

    def plan(self) -> tuple[list[Chunk], list[Copy]]:
        """Advance `filled` and `newest` of all slots to what the next step computes.

        A prompt that does not fit into the step's budget ends the plan, so at most one is ever
        in the middle of its prefill, and every prefix of another slot is whole after this step.

        Returns:
            The prompt tokens before the newest, and the prefixes to copy.
        """
        slots, budget = self._slots, self._prefill_tokens
        chunks: list[Chunk] = []
        copies: list[Copy] = []
        begun = slots.counts[: len(slots)] > 0
        slots.filled[: len(slots)] += begun
        if self.prefilling:
            self.prefilling = False
            for slot in np.flatnonzero(~begun).tolist():
                budget -= self._prefill(slot, budget, chunks)
        while self.queue and len(slots) < self._size and budget > 0:
            slot = slots.add(self.queue.popleft())
            self._share(slot, copies)
            budget -= self._prefill(slot, budget, chunks)
        return chunks, copies

    def _prefill(self, slot: int, budget: int, chunks: list[Chunk]) -> int:
        """Plan the next tokens of a slot's prompt, and return their number."""
        slots = self._slots
        start, length = int(slots.filled[slot]), int(slots.lengths[slot])
        end = min(length, start + max(1, budget))
        slots.filled[slot] = end
        if end - start > 1:
            part = slots.prompts[slot, start : end - 1]
            chunks.append(Chunk(slot=slot, start=start, tokens=part))
        slots.newest[slot] = slots.prompts[slot, end - 1]
        self.prefilling = end < length
        return end - start

    def _share(self, slot: int, copies: list[Copy]) -> None:
        """Plan to copy what another slot's prompt, under the same adapter, has in common with this.

        The last token is always computed, because its logits are needed.
        """
        slots = self._slots
        prompt = slots.prompts[slot, : slots.lengths[slot] - 1]
        if len(prompt) < _WORTH_SHARING:
            return
        alike = (slots.prompts[:slot, :_WORTH_SHARING] == prompt[:_WORTH_SHARING]).all(axis=1)
        others = np.flatnonzero(alike & (slots.adapters[:slot] == slots.adapters[slot]))
        if not len(others):
            return
        same = (slots.prompts[others, : len(prompt)] == prompt).cumprod(axis=1).sum(axis=1)
        same = np.minimum(same, np.minimum(slots.lengths[others], slots.filled[others]))
        best = int(same.argmax())
        source, shared = int(others[best]), int(same[best])
        if shared < _WORTH_SHARING:
            return
        slots.filled[slot] = shared
        targets = [slot]
        if copies and (copies[-1].source, copies[-1].positions) == (source, shared):
            targets = [*copies.pop().targets, slot]
        copies.append(Copy(source=source, targets=targets, positions=shared))
