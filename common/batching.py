"""Rollouts as padded tensors, and token-budget micro-batches.

Sequences are left-aligned ``prompt + response + padding``. The logits that predict response token
t stand at position ``prompt_length - 1 + t``; that one line (`predict_BR`) is the alignment of
the whole system, used by the learner and the reference policy alike.

Shape suffixes: B sequences, T positions, R response positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_PASS_TOKENS = 256
"""Padded tokens that cost about as much as one more forward and backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """Left-aligned sequences."""

    tokens_BT: Tensor
    """int64 prompt + response, then zeros."""
    predict_BR: Tensor
    """int64: the position whose logits predict response token t (-1 outside the mask)."""
    response_BR: Tensor
    """int64 response tokens (0 outside the mask)."""
    response_mask_BR: Tensor
    """bool, True = a real response token, trained on."""
    last_B: Tensor
    """int64: the position of the last response token, where a reward is read."""

    @property
    def lengths_B(self) -> Tensor:
        """int64: tokens of each sequence."""
        return self.last_B + 1

    @property
    def prompts_B(self) -> Tensor:
        """int64: tokens of each prompt."""
        return self.predict_BR[:, 0] + 1

    def to(self, device: torch.device) -> SequenceBatch:
        """Return the same batch on a device."""
        return SequenceBatch(
            tokens_BT=self.tokens_BT.to(device),
            predict_BR=self.predict_BR.to(device),
            response_BR=self.response_BR.to(device),
            response_mask_BR=self.response_mask_BR.to(device),
            last_B=self.last_B.to(device),
        )


def sequence_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> SequenceBatch:
    """Lay out prompts with their responses.

    Args:
        prompts: tokens of each prompt.
        responses: tokens of each response, in the same order.

    Raises:
        ValueError: a prompt or response is empty.
    """
    sizes = [(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]
    if any(not p or not r for p, r in sizes):
        raise ValueError("a sequence needs at least one prompt and one response token")
    longest, reach = max(p + r for p, r in sizes), max(r for _, r in sizes)
    tokens_BT = torch.zeros(len(sizes), longest, dtype=torch.int64)
    response_BR = torch.zeros(len(sizes), reach, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens_BT[row, : sum(sizes[row])] = torch.tensor([*prompt, *response])
        response_BR[row, : len(response)] = torch.tensor(list(response))
    first_B1 = torch.tensor([p for p, _ in sizes])[:, None]
    steps_1R = torch.arange(reach)[None]
    mask_BR = steps_1R < torch.tensor([r for _, r in sizes])[:, None]
    return SequenceBatch(
        tokens_BT=tokens_BT,
        predict_BR=torch.where(mask_BR, first_B1 - 1 + steps_1R, -1),
        response_BR=response_BR,
        response_mask_BR=mask_BR,
        last_B=torch.tensor([p + r - 1 for p, r in sizes]),
    )


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows so that ``rows x longest row <= budget``, longest first, at the lowest cost.

    A group costs its padded tokens and `_PASS_TOKENS`, so that padding is small and passes few.
    A row longer than the budget is a group by itself: it has to be run somehow.

    Args:
        lengths: tokens of each row.
        budget: padded tokens of a group.

    Returns:
        Row numbers of each group.
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
        totals = costs[starts] + sizes[starts] * (end - starts) + _PASS_TOKENS
        best = int(totals.argmin())
        costs[end], cuts[end] = totals[best], first + best
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[cuts[end] : end])
        end = cuts[end]
    return groups[::-1]


def shared_micro_batches(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    budget: int,
    ranks: int = 1,
) -> list[list[list[int]]]:
    """Group rows for a model that computes a prompt of several rows once (`shares_prompts`).

    Rows of one prompt stay together as far as the budget and the ranks allow, and a group is as
    large as its tokens without padding. Ranks carry like loads, in as few groups as fit.

    Args:
        prompts: tokens of each row's prompt.
        responses: tokens of each row's response.
        budget: tokens of a group; a row that is longer is a group by itself.
        ranks: how many share the work.

    Returns:
        Row numbers of each group of each rank, largest groups first.
    """
    parts = _parts_of_prompts(prompts, [len(response) for response in responses], budget, ranks)
    loads = [0] * ranks
    filled: list[list[tuple[int, list[int]]]] = [[] for _ in range(ranks)]
    for size, part in sorted(parts, key=lambda sized: (-sized[0], sized[1][0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        groups = filled[rank]
        fitting = (i for i, (used, _) in enumerate(groups) if used + size <= budget)
        if (at := next(fitting, None)) is None:
            groups.append((size, part))
        else:
            groups[at] = groups[at][0] + size, [*groups[at][1], *part]
    return [[rows for _, rows in groups] for groups in filled]


def _parts_of_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[int], budget: int, ranks: int
) -> list[tuple[int, list[int]]]:
    """Return rows of one prompt and their tokens, in equal parts where they are too many."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(row)
    share = max(1, (sum(map(len, by_prompt)) + sum(responses)) // ranks)
    parts: list[tuple[int, list[int]]] = []
    for prompt, members in by_prompt.items():
        own, total = len(prompt), sum(responses[row] for row in members)
        count = max(math.ceil(total / max(1, budget - own)), (own + total) // share, 1)
        limit = min(math.ceil(total / count), budget - own)
        size, part = 0, list[int]()
        for row in members:
            if part and size + responses[row] > limit:
                parts.append((own + size, part))
                size, part = 0, []
            size += responses[row]
            part.append(row)
        parts.append((own + size, part))
    return parts


def pad_rows(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return ragged rows as float32 ``[B, width]``, zeros on the right."""
    padded_BR = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        padded_BR[index, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return padded_BR
