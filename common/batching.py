"""Rollouts as padded tensors, and token-budget micro-batches.

Sequences are left-aligned ``prompt + response + padding``. The logits that predict response token
t stand at position ``prompt_length - 1 + t``; that one line (`predict_BR`) is the alignment of
the whole system, used by the learner and the reference policy alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_PASS_TOKENS = 256
"""Padded tokens that cost about as much as one more forward and backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """Left-aligned sequences. B sequences, T positions, R response positions."""

    tokens_BT: Tensor
    """int64 prompt + response, then zeros."""
    predict_BR: Tensor
    """int64: the position whose logits predict response token t (0 outside the mask)."""
    response_BR: Tensor
    """int64 response tokens (0 outside the mask)."""
    response_mask_BR: Tensor
    """bool, True = a real response token, trained on."""
    last_B: Tensor
    """int64: the position of the last response token, where a reward is read."""


def sequence_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> SequenceBatch:
    """Lay out sequences. Raises ValueError for an empty prompt or response."""
    sizes = [(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]
    if any(not p or not r for p, r in sizes):
        raise ValueError("a sequence needs at least one prompt and one response token")
    batch, longest, reach = (
        len(sizes),
        max(p + r for p, r in sizes),
        max(r for _, r in sizes),
    )
    tokens = torch.zeros(batch, longest, dtype=torch.int64)
    response = torch.zeros(batch, reach, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : sum(sizes[row])] = torch.tensor([*prompt, *answer])
        response[row, : len(answer)] = torch.tensor(list(answer))
    first = torch.tensor([p for p, _ in sizes])[:, None]
    steps = torch.arange(reach)[None]
    mask = steps < torch.tensor([r for _, r in sizes])[:, None]
    return SequenceBatch(
        tokens_BT=tokens,
        predict_BR=torch.where(mask, first - 1 + steps, torch.zeros_like(steps)),
        response_BR=response,
        response_mask_BR=mask,
        last_B=torch.tensor([p + r - 1 for p, r in sizes]),
    )


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups of ``rows x longest row <= budget``, longest first: the cheapest grouping.

    A group costs its padded tokens and `_PASS_TOKENS`, so that padding is small and passes few.
    A row longer than the budget stands alone: it has to be run somehow.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = np.array([lengths[i] for i in order], dtype=np.int64)
    costs = np.zeros(len(order) + 1)
    cuts = [0] * (len(order) + 1)
    first = 0
    for end in range(1, len(order) + 1):
        # Rows shrink along the order: a start whose group has outgrown the budget stays out.
        while first < end - 1 and sizes[first] * (end - first) > budget:
            first += 1
        starts = np.arange(first, end)
        found = costs[starts] + sizes[starts] * (end - starts) + _PASS_TOKENS
        best = int(found.argmin())
        costs[end], cuts[end] = found[best], first + best
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[cuts[end] : end])
        end = cuts[end]
    return groups[::-1]


def pad_rows(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """float32 ``[B, width]`` from ragged rows, zeros on the right."""
    out = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return out
