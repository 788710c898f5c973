"""Rollouts as padded tensors, and token-budget micro-batches.

Sequences are left-aligned ``prompt + response + padding``. The logits that predict response token
t stand at position ``prompt_length - 1 + t``; that one line (`predict_BR`) is the alignment of
the whole system, used by the learner and the reference policy alike.

Shape suffixes: B sequences, T positions, R response positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_PASS_TOKENS = 256
"""Padded tokens that cost about as much as one more forward and backward pass."""
_SPREAD = 8
"""Rows times the longest of a group whose prompts are shared, in budgets: states are read by rows
again, and a prompt's of all its rows stand in memory once for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """Left-aligned sequences, on the processor: networks move what they compute with."""

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


def rows_by_prompt(prompts: Iterable[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return the row numbers of each prompt, in the order in which prompts come first."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(row)
    return rows


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
        budget: tokens of a group, and its rows times the longest are at most `_SPREAD` as many; a
            row that is longer is a group by itself.
        ranks: how many share the work.

    Returns:
        Row numbers of each group of each rank.
    """
    parts = _parts_of_prompts(prompts, [len(response) for response in responses], budget, ranks)
    loads = [0] * ranks
    filled: list[list[_Group]] = [[] for _ in range(ranks)]
    for part in sorted(parts, key=lambda group: (-group.tokens, group.rows[0])):
        rank = loads.index(min(loads))
        loads[rank] += part.tokens
        for at, group in enumerate(filled[rank]):
            if (together := group.joined(part)).fits(budget):
                filled[rank][at] = together
                break
        else:
            filled[rank].append(part)
    return [[group.rows for group in groups] for groups in filled]


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are computed together."""

    rows: list[int]
    tokens: int
    """Every prompt once."""
    longest: int
    """Tokens of the longest row, its prompt included."""

    def joined(self, other: _Group) -> _Group:
        """Return both together; they have no prompt in common."""
        return _Group(
            self.rows + other.rows, self.tokens + other.tokens, max(self.longest, other.longest)
        )

    def fits(self, budget: int) -> bool:
        """Whether it is small enough."""
        return self.tokens <= budget and len(self.rows) * self.longest <= _SPREAD * budget


def _parts_of_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[int], budget: int, ranks: int
) -> list[_Group]:
    """Return the rows of each prompt, in like parts where they are too many for a group or rank."""
    by_prompt = rows_by_prompt(prompts)
    share = max(1, (sum(map(len, by_prompt)) + sum(responses)) // ranks)
    parts: list[_Group] = []
    for prompt, members in by_prompt.items():
        total = len(prompt) + sum(responses[row] for row in members)
        room = max(1, budget - len(prompt))
        count = max(total // share, -(-(total - len(prompt)) // room), 1)
        own = _in_parts(members, len(prompt), responses, count)
        while any(len(part.rows) > 1 and not part.fits(budget) for part in own):
            count += 1
            own = _in_parts(members, len(prompt), responses, count)
        parts += own
    return parts


def _in_parts(
    members: Sequence[int], prompt: int, responses: Sequence[int], count: int
) -> list[_Group]:
    """Deal the rows of one prompt, longest first, each to the part with the fewest tokens."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for row in sorted(members, key=lambda row: (-responses[row], row)):
        at = sizes.index(min(sizes))
        dealt[at].append(row)
        sizes[at] += responses[row]
    return [
        _Group(sorted(rows), prompt + size, prompt + max(responses[row] for row in rows))
        for rows, size in zip(dealt, sizes, strict=True)
        if rows
    ]


def pad_rows(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return ragged rows as float32 ``[B, width]``, zeros on the right."""
    padded_BR = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        padded_BR[index, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return padded_BR
