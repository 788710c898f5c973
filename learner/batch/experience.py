"""A batch of scored trajectories as the learner sees it.

Every rank holds the whole batch (a few megabytes through shared memory) and computes its share of
the forward passes; scalars per token are then summed over ranks, so that advantages are computed
on the global batch, the same on every rank.

Shape suffixes: N rows of the whole batch, R response positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from common.batching import SequenceBatch, pad_rows, sequence_batch
from common.errors import TrainingError
from common.wire.trajectory import ScoredTrajectory, from_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Prompts with their responses, in tokens."""

    prompts: list[list[int]]
    responses: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Prompt + response tokens per row."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def mask_NR(self) -> Tensor:
        """The response_mask of the whole batch, bool ``[N, R]``."""
        lengths_N = torch.tensor([len(r) for r in self.responses])
        return torch.arange(int(lengths_N.max()))[None] < lengths_N[:, None]

    def response_tokens(self, rows: Sequence[int]) -> float:
        """Count the response tokens of some rows: what their losses are normalised by."""
        return float(sum(len(self.responses[row]) for row in rows))

    def batch(self, rows: Sequence[int]) -> SequenceBatch:
        """Return the padded tensors of some rows."""
        return sequence_batch([self.prompts[i] for i in rows], [self.responses[i] for i in rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """N trajectories in rollout_id order. R is the longest response."""

    sequences: Sequences
    scores_N: Tensor
    """float32, before the EOS trick."""
    token_scores_NR: Tensor | None
    """float32 parts of the scores that are rewards on single tokens; None where there are none."""
    ended_N: Tensor
    """bool, the response ended by itself, not at the limit."""
    groups_N: Tensor
    """int64, rows of one prompt share it."""
    behavior_NR: Tensor
    """float32 behavior_logprobs."""
    reference_NR: Tensor
    """float32 ref_logprobs."""
    mask_NR: Tensor
    """bool response_mask."""
    versions: tuple[int, ...]
    """policy_version per row."""
    sources: tuple[str | None, ...]
    """Source of the prompt per row; None without a mixture."""
    components: tuple[Mapping[str, float], ...]
    """score_components per row."""

    def __len__(self) -> int:
        return len(self.sequences)


def experience(tables: Sequence[pa.Table], adapter: str = "") -> Experience:
    """Gather tables of ScoredTrajectory in rollout_id order.

    Args:
        tables: in any order.
        adapter: the one that is trained; empty where all weights are.

    Raises:
        TrainingError: a row was sampled from something else than `adapter`, which is trained.
    """
    rows = [t for table in tables for t in from_table(table, ScoredTrajectory)]
    rows.sort(key=lambda t: t.rollout_id)
    for row in rows:
        if row.adapter != adapter:
            raise TrainingError(
                f"rollout {row.rollout_id} was sampled from adapter '{row.adapter}', and what is "
                f"trained is '{adapter}'"
            )
    reach = max(len(t.response_ids) for t in rows)
    sequences = Sequences(
        prompts=[t.prompt_ids for t in rows], responses=[t.response_ids for t in rows]
    )
    return Experience(
        sequences=sequences,
        scores_N=torch.tensor([t.score for t in rows], dtype=torch.float32),
        token_scores_NR=_token_scores(rows, reach),
        ended_N=torch.tensor([t.finish_reason != "length" for t in rows]),
        groups_N=torch.tensor([t.group for t in rows]),
        behavior_NR=pad_rows([t.behavior_logprobs for t in rows], reach),
        reference_NR=pad_rows([t.ref_logprobs for t in rows], reach),
        mask_NR=sequences.mask_NR,
        versions=tuple(t.policy_version for t in rows),
        sources=tuple(t.source for t in rows),
        components=tuple(t.score_components for t in rows),
    )


def _token_scores(rows: Sequence[ScoredTrajectory], reach: int) -> Tensor | None:
    if all(row.token_scores is None for row in rows):
        return None
    return pad_rows([row.token_scores or [0.0] * len(row.response_ids) for row in rows], reach)
