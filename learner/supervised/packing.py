"""Demonstrations and comparisons in tokens, and rows of several demonstrations each.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """A demonstration in tokens."""

    prompt: list[int]
    response: list[int]
    """EOS included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedComparison:
    """A comparison in tokens."""

    prompt: list[int]
    chosen: list[int]
    """EOS included."""
    rejected: list[int]
    """EOS included."""
    confidence: float
    """Probability that `chosen` is the better one, 0.5 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows of several documents each. No document attends to another."""

    tokens_BT: Tensor
    """int64; padding is 0."""
    positions_BT: Tensor
    """int64, from 0 in every document."""
    segments_BT: Tensor
    """int64 document number in the row; padding has its own, -1."""
    target_mask_BT: Tensor
    """bool: the *next* token is a response token of the same document (loss on the response)."""


def pack(pairs: Sequence[EncodedPair], length: int) -> list[list[int]]:
    """Indices of pairs per row, first fit over the open rows in order; none is split.

    Only the last 16 rows are kept open, which keeps packing linear and rows over 95 % full.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, pair in enumerate(pairs):
        size = len(pair.prompt) + len(pair.response)
        for row in range(max(0, len(rows) - 16), len(rows)):
            if size <= room[row]:
                rows[row].append(index)
                room[row] -= size
                break
        else:
            rows.append([index])
            room.append(length - size)
    return rows


def packed_batch(
    pairs: Sequence[EncodedPair], rows: Sequence[Sequence[int]], length: int
) -> Packed:
    """Tensors of packed rows."""
    shape = (len(rows), length)
    tokens, positions = (
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
    )
    segments = torch.full(shape, -1)
    target = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        at = 0
        for segment, index in enumerate(members):
            pair = pairs[index]
            ids = [*pair.prompt, *pair.response]
            end = at + len(ids)
            tokens[row, at:end] = torch.tensor(ids)
            positions[row, at:end] = torch.arange(len(ids))
            segments[row, at:end] = segment
            target[row, at + len(pair.prompt) - 1 : end - 1] = True
            at = end
    return Packed(
        tokens_BT=tokens,
        positions_BT=positions,
        segments_BT=segments,
        target_mask_BT=target,
    )
