"""Rows of a batch dealt to ranks, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.batching import micro_batches, shared_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The rows of one micro-batch of one rank."""

    rows: list[int]
    """Row numbers in the whole batch."""
    real: bool
    """False for a filler that only keeps ranks in step: its loss must be multiplied by 0."""
    last: bool
    """No other micro-batch of this rank comes before the optimizer step."""


Lengths = Sequence[int] | Mapping[int, int]
"""Tokens of rows by their numbers; of those that are dealt at least."""


def deal(
    rows: Sequence[int], lengths: Lengths, *, ranks: int, rank: int, budget: int
) -> list[Share]:
    """Return one rank's micro-batches of some rows: as many as every other rank's.

    Rows are dealt longest first, so that ranks carry like loads; a rank with fewer micro-batches
    repeats a row as a filler, because all ranks must run the same number of collectives.

    Args:
        rows: row numbers in the whole batch.
        lengths: tokens of these rows.
        ranks: ranks in all.
        rank: the one asked for.
        budget: padded tokens of one micro-batch.
    """
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    by_rank = [order[r::ranks] for r in range(ranks)]
    cut = [
        [[own[i] for i in group] for group in micro_batches([lengths[i] for i in own], budget)]
        for own in by_rank
    ]
    return _in_step(cut, rank, filler=order[-1])


def deal_shared(
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    ranks: int,
    rank: int,
    budget: int,
) -> list[Share]:
    """As `deal`, for a model that computes a prompt of several rows once.

    Args:
        rows: row numbers in the whole batch.
        prompts: tokens of the prompt of every row of the whole batch.
        responses: tokens of every response.
        ranks: ranks in all.
        rank: the one asked for.
        budget: tokens of one micro-batch, without padding.
    """
    groups = shared_micro_batches(
        [prompts[row] for row in rows], [responses[row] for row in rows], budget, ranks
    )
    cut = [[[rows[i] for i in group] for group in own] for own in groups]
    shortest = min(rows, key=lambda row: (len(prompts[row]) + len(responses[row]), row))
    return _in_step(cut, rank, filler=shortest)


def _in_step(cut: list[list[list[int]]], rank: int, *, filler: int) -> list[Share]:
    """Return a rank's micro-batches, as many as of the rank that has most."""
    count, mine = max(len(groups) for groups in cut), cut[rank]
    fillers = [[filler]] * (count - len(mine))
    return [
        Share(rows=group, real=index < len(mine), last=index == count - 1)
        for index, group in enumerate(mine + fillers)
    ]
