"""The forward for processors: `common.native` with its cache in blocks.

Shape suffixes: B rows, S slots in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.generation.forward import Step
from common.logprobs import Sampling
from common.models.decoder import Decoder
from common.native.cache import Blocks
from common.native.model import BLOCK, NativeModel, block_bytes
from common.native.panels import Spent
from common.pages import Pages


class NativeForward:
    """Weights, keys and values of all slots, on the processor."""

    def __init__(
        self, decoder: Decoder, slots: int, *, cache_bytes: float | None = None, block: int = BLOCK
    ) -> None:
        """Products and cache in the dtype of `decoder`'s parameters.

        Args:
            decoder: one that `common.native.coverage.why_not` says nothing of.
            slots: sequences that are computed at once.
            cache_bytes: of all their keys and values; default what whole contexts take.
            block: positions of a block of the cache.

        Raises:
            ClusterError: there is no C compiler, or it fails.
        """
        context = decoder.sizes.context
        self._each = block_bytes(decoder, next(decoder.parameters()).dtype, block)
        one = -(-context // block)
        blocks = slots * one
        if cache_bytes is not None:
            blocks = max(one, min(blocks, int(cache_bytes / self._each)))
        self.slots = slots
        self._blocks = Blocks(blocks, block, slots, context)
        self._model = NativeModel(decoder, blocks, block=block)
        self._logits_SV = Pages((slots, self._model.vocabulary), torch.float32).tensor

    def take(self, decoder: Decoder, adapters: Sequence[str], spent: Spent | None = None) -> None:
        """Run with the weights that a decoder has now, with its one adapter merged.

        Raises:
            TrainingError: the adapter is not finite.
        """
        (adapter,) = adapters
        self._model.take(decoder, adapter, spent)

    def run(self, step: Step) -> Tensor:
        """fp32 logits ``[S, V]`` after the newest token of each slot, valid until the next call.

        Their memory is used again: fresh pages would cost a fiftieth of a step.
        """
        blocks, used = self._blocks, step.used
        reached = step.rows[2, :used] + 1
        begun = np.ones(used, dtype=bool)
        for copy in step.copies:
            begun[np.asarray(copy.targets)] = False
        blocks.grow_all(np.where(begun, reached, 0))
        copies = []
        for copy in step.copies:
            for target in copy.targets:
                copies.append(blocks.share(copy.source, target, copy.positions))
                blocks.grow(target, int(reached[target]))
        logits_SV = self._logits_SV[:used]
        self._model.run(
            step.rows,
            blocks.table,
            logits_WV=logits_SV,
            copies=[copy for copy in copies if copy],
            alone=not copies and step.rows.shape[1] == used,
        )
        return logits_SV

    def forget(self) -> None:
        """Give back the memory of the packed weights, until others are taken."""
        self._model.forget()

    def rest(self) -> None:
        """Keep everything: what it holds is made once."""

    def needed(self, positions: int, shared: int) -> int:
        """Return the blocks of a slot of so many positions, beside what it shares."""
        return int(self._blocks.of(positions)) - shared // self._blocks.block

    def fits(self, wanted: int, reserved: np.ndarray) -> bool:
        """Whether a slot that takes so many blocks can begin beside others."""
        return self._blocks.fits(wanted, reserved)

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values; the other is empty then."""
        self._blocks.move(source, target)

    def clear(self, slot: int) -> None:
        """Forget a slot's keys and values."""
        self._blocks.clear(slot)

    def memory(self) -> dict[str, int]:
        """Return bytes of the packed weights, and what keys and values took at most."""
        return {"weights": self._model.weight_bytes, "cache": self._blocks.peak * self._each}

    def draw(
        self, logits_BV: Tensor, sampling: Sampling, positions_B: np.ndarray, uniforms_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a token per row, as `Forward.draw`."""
        return self._model.draw(logits_BV, sampling, positions_B, uniforms_B)

    def seconds(self) -> dict[str, float]:
        """Return the time spent so far, by kind of work."""
        return self._model.seconds()
