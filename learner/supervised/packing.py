"""Demonstrations packed into rows of one length, several to a row.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.supervised.examples import EncodedPair

_OPEN_ROWS = 16


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
    """bool: the *next* token is a response token of the same document (loss on the response,
    of a conversation on the assistant's turns)."""


def pack(pairs: Sequence[EncodedPair], length: int) -> list[list[int]]:
    """Return the pairs of each row, as indices: first fit over the open rows; none is split.

    Only the last 16 rows are kept open, which keeps packing linear and rows over 95 % full.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, pair in enumerate(pairs):
        size = len(pair.prompt) + len(pair.response)
        for row in range(max(0, len(rows) - _OPEN_ROWS), len(rows)):
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
    """Lay out packed rows.

    Args:
        pairs: all demonstrations.
        rows: indices of the pairs in each row.
        length: tokens of a row.
    """
    shape = (len(rows), length)
    tokens_BT = torch.zeros(shape, dtype=torch.int64)
    positions_BT = torch.zeros(shape, dtype=torch.int64)
    segments_BT = torch.full(shape, -1)
    target_BT = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        begin = 0
        for segment, index in enumerate(members):
            pair = pairs[index]
            ids = [*pair.prompt, *pair.response]
            end = begin + len(ids)
            tokens_BT[row, begin:end] = torch.tensor(ids)
            positions_BT[row, begin:end] = torch.arange(len(ids))
            segments_BT[row, begin:end] = segment
            first = begin + len(pair.prompt) - 1
            target_BT[row, first : end - 1] = True
            for others, turn in pair.between:
                target_BT[row, first + others : first + turn] = False
            begin = end
    return Packed(
        tokens_BT=tokens_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        target_mask_BT=target_BT,
    )
