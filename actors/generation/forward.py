"""What one step of the cached forward computes, and the interface of its implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from common.logprobs import Sampling
from common.models.decoder import Decoder
from common.native.panels import Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A run of a prompt without its newest token, which stands among the slots' newest."""

    slot: int
    start: int
    """Position of the first token."""
    tokens: Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A prefix that slots share with another: its keys and values are not computed again.

    What has to be copied is copied in order, after the step's own keys and values are written.
    """

    source: int
    targets: Sequence[int]
    positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Flat rows: the newest token of slots 0 .. used - 1, then the tokens of the chunks."""

    rows: np.ndarray
    """int64 ``[4, N]``, contiguous: tokens, slots, positions, and indices of adapters, one for all
    rows of a slot."""
    used: int
    chunks: Sequence[Chunk]
    copies: Sequence[Copy]


def lay_out(
    newest: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    chunks: Sequence[Chunk],
    copies: Sequence[Copy],
    adapters: Sequence[int] | np.ndarray | int,
) -> Step:
    """Lay out the rows of a step.

    Args:
        newest: tokens, one per slot in use.
        positions: likewise.
        chunks: earlier tokens of prompts.
        copies: prefixes to copy.
        adapters: indices, one per slot in use or one for all.
    """
    sizes = [len(chunk.tokens) for chunk in chunks]
    rows = np.empty((4, len(newest) + sum(sizes)), dtype=np.int64)
    end = len(newest)
    rows[0, :end], rows[1, :end], rows[2, :end] = newest, np.arange(end), positions
    rows[3, :end] = adapters
    for chunk, size in zip(chunks, sizes, strict=True):
        begin, end = end, end + size
        places = np.arange(chunk.start, chunk.start + size)
        rows[0, begin:end], rows[1, begin:end], rows[2, begin:end] = (
            chunk.tokens,
            chunk.slot,
            places,
        )
        rows[3, begin:end] = rows[3, chunk.slot]
    return Step(rows=rows, used=len(newest), chunks=chunks, copies=copies)


class Forward(Protocol):
    """Weights, keys and values of all slots, and the pass over them."""

    slots: int
    """Sequences that are computed at once."""

    def take(self, decoder: Decoder, adapters: Sequence[str], spent: Spent | None = None) -> None:
        """Run with the weights that a decoder has now.

        Args:
            decoder: of the shape that this was made for.
            adapters: what rows can run with, in the order of their indices; a single one is
                merged into the weights.
            spent: called with weights that are needed no more, where they are kept otherwise.

        Raises:
            TrainingError: an adapter is not finite.
        """

    def run(self, step: Step) -> Tensor:
        """Logits ``[S, V]`` after the newest token of each slot, valid until the next call."""

    def forget(self) -> None:
        """Give back the memory of weights that it keeps for itself, until others are taken."""

    def rest(self) -> None:
        """No slot is in use: give back what can be taken again at the next step."""

    def needed(self, positions: int, shared: int) -> int:
        """Return the blocks of the cache that so many positions take, beside what is shared."""

    def fits(self, wanted: int, reserved: np.ndarray) -> bool:
        """Whether a slot of so many blocks can begin; those in use take up to `reserved`."""

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values; the other is empty then."""

    def clear(self, slot: int) -> None:
        """Forget a slot's keys and values."""

    def memory(self) -> dict[str, int]:
        """Return bytes: "weights" that it keeps, and "cache", what keys and values took at most."""

    def draw(
        self, logits: Tensor, sampling: Sampling, positions: np.ndarray, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a token per row, as `common.logprobs.draw` of `sampling_logits`.

        Args:
            logits: fp32 ``[B, V]``.
            sampling: the distribution.
            positions: int64 ``[B]``, places of the tokens in their responses.
            uniforms: float64 ``[B]``.

        Returns:
            int64 tokens ``[B]``, and float32 log-probabilities: in the distribution, and in the
            whole one (`Sampling.unfiltered`).
        """
