"""Which tokens the next step computes: requests take free slots, prompts are cut into chunks."""

from __future__ import annotations

from collections import deque

import numpy as np

from actors.generation.forward import Chunk, Copy, Forward
from actors.generation.slots import Slots, Waiting

_WORTH_SHARING = 8
"""Shorter common prefixes cost more to find than to compute again."""


class Scheduler:
    """The requests that wait for a slot, and the plan of every step."""

    def __init__(self, slots: Slots, forward: Forward, size: int, prefill_tokens: int) -> None:
        """`size` slots at most, and so many prompt tokens in a step.

        A request begins when the cache of `forward` has room for its longest response, beside
        those of all that have begun: none has to be stopped and begun again.
        """
        self.queue: deque[Waiting] = deque()
        self.prefilling = False
        """A slot is in the middle of its prompt."""
        self._slots, self._forward = slots, forward
        self._size, self._prefill_tokens = size, prefill_tokens

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
            prompt = len(self.queue[0].request.prompt_ids)
            longest, reserved = prompt + self.queue[0].limit, slots.reserved[: len(slots)]
            # At best all of its prompt is shared: looking for that takes longer than this.
            if not self._forward.fits(self._forward.needed(longest, prompt - 1), reserved):
                break
            source, shared = self._alike(self.queue[0])
            needed = self._forward.needed(longest, shared)
            if not self._forward.fits(needed, reserved):
                break
            slot = slots.add(self.queue.popleft(), needed)
            if shared:
                self._share(source, slot, shared, copies)
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

    def _alike(self, waiting: Waiting) -> tuple[int, int]:
        """Find the slot whose prompt, under the same adapter, has most in common with a request's.

        The last token is always computed, because its logits are needed.

        Returns:
            The slot, and how many positions; 0 where they are not worth it.
        """
        slots, used = self._slots, len(self._slots)
        prompt = np.asarray(waiting.request.prompt_ids[:-1], dtype=np.int32)
        if len(prompt) < _WORTH_SHARING:
            return 0, 0
        alike = (slots.prompts[:used, :_WORTH_SHARING] == prompt[:_WORTH_SHARING]).all(axis=1)
        others = np.flatnonzero(alike & (slots.adapters[:used] == waiting.adapter))
        if not len(others):
            return 0, 0
        same = (slots.prompts[others, : len(prompt)] == prompt).cumprod(axis=1).sum(axis=1)
        same = np.minimum(same, np.minimum(slots.lengths[others], slots.filled[others]))
        best = int(same.argmax())
        shared = int(same[best])
        return int(others[best]), shared if shared >= _WORTH_SHARING else 0

    def _share(self, source: int, slot: int, shared: int, copies: list[Copy]) -> None:
        """Plan to give a slot the first positions of another."""
        self._slots.filled[slot] = shared
        targets = [slot]
        if copies and (copies[-1].source, copies[-1].positions) == (source, shared):
            targets = [*copies.pop().targets, slot]
        copies.append(Copy(source=source, targets=targets, positions=shared))
