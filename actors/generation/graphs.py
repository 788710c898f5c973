"""Decode steps recorded once and replayed: CUDA graphs, which launch a step as a whole.

A step of a decoder is several hundred small operations. On a GPU the processor takes longer to ask
for them than the GPU takes to compute them. A graph has the operations with all their addresses,
so a step can be replayed if it reads and writes the same memory, in the same shapes. Steps are
therefore of a few sizes (`coarse`), read from one buffer and write into another.

A recording is held against the step that it was made of, before it is used.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from common.devices import Doing, Record
from common.errors import TrainingError

_WORTH = 3
"""Steps of one size after which the next ones are replayed: the first show that there are more, and
let libraries choose and load what they compute with."""
_MOST = 64
"""Recordings that are kept; the one that was not used for longest goes."""
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""By how much normalised states of a replayed step may differ, by the dtype of products."""


def coarse(number: int, finest: int) -> int:
    """Round up to a multiple of `finest`, and to one of four sizes in each doubling."""
    step = max(finest, (1 << (number - 1).bit_length()) // 8)
    return -(-number // step) * step


class Graphs:
    """Recordings of steps, by their sizes."""

    def __init__(self, begin: Callable[[], Record], dtype: torch.dtype) -> None:
        """Record steps whose products are in `dtype`.

        Args:
            begin: returns what records steps of one lease.
            dtype: bf16, or fp32.
        """
        self.replayed = 0
        """Steps that were replayed."""
        self._begin: Callable[[], Record] | None = begin
        self._record: Record | None = None
        self._close = _CLOSE[dtype]
        self._kept: OrderedDict[tuple[int, ...], tuple[Callable[[], object], Tensor]]
        self.forget()

    def forget(self) -> None:
        """Drop all recordings: what they read or write is elsewhere now.

        So whether a step is replayed depends on what came before it in its lease, and on nothing
        that an actor did earlier.
        """
        self._kept, self._seen = OrderedDict(), Counter[tuple[int, ...]]()
        self._record = None

    def run(self, size: tuple[int, ...], compute: Doing) -> Tensor:
        """Do a step, replayed where that is worth it.

        Args:
            size: of the step; steps of one size do the same with the same memory.
            compute: does it.

        Raises:
            TrainingError: the recording computes something else than the step.
        """
        if size in self._kept:
            self._kept.move_to_end(size)
            replay, out = self._kept[size]
            replay()
            self.replayed += 1
            return out
        out = compute()
        self._seen[size] += 1
        if self._begin is not None and self._seen[size] >= _WORTH:
            self._record = self._record or self._begin()
            self._keep(size, self._record, compute, out)
        return out

    def _keep(self, size: tuple[int, ...], record: Record, compute: Doing, out: Tensor) -> None:
        """Record a step that has just been done, and hold the recording against it."""
        expected = out.clone()
        try:
            replay = record(compute)
        except RuntimeError as error:  # no memory for it is one
            self._begin = None
            self.forget()
            [reason, *_] = str(error).splitlines() or [type(error).__name__]
            logging.getLogger(__name__).warning(
                "decode steps are not recorded in CUDA graphs: %s; generation is slower without",
                reason,
            )
            out.copy_(expected)
            return
        out.fill_(torch.nan)  # a GPU does nothing while it records
        replay()
        off = float((out - expected).abs().max().cpu())
        if not off <= self._close * max(1.0, float(expected.abs().max().cpu())):
            raise TrainingError(
                f"a decode step that was recorded in a CUDA graph computes states that are off by "
                f"{off:.2g} from its own: set rollout.graphs to false, and report it"
            )
        if len(self._kept) == _MOST:
            self._kept.popitem(last=False)
        self._kept[size] = replay, out
