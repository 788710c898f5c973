"""A learner rank as a Ray actor, which tells what it does.

In a file of its own: what it imports (DeepSpeed) the elastic workers never load.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from common.wire.trajectory import rows_without
from deploy.workers.told import Told, response_tokens
from learner import rank


class LearnerRank(Told, rank.LearnerRank):
    """A learner rank in its own process."""

    def advance(self, steps: int, *, anew: bool = True) -> dict[str, float]:
        """Take steps of a supervised stage, and count that."""
        with self.work.call():
            return super().advance(steps, anew=anew)

    def policy_phase(
        self,
        iteration: int,
        log: str | None,
        *tables: pa.Table,
        without: Collection[str] = frozenset(),
    ) -> dict[str, float]:
        """Train on an iteration, and count that."""
        with self.work.call():
            metrics = super().policy_phase(iteration, log, *tables, without=without)
        if self.rank == 0:  # all ranks are given all rows
            self.work.tokens += response_tokens([rows_without(table, without) for table in tables])
        return metrics

    def auxiliary_phase(self, iteration: int) -> dict[str, float]:
        """Run an auxiliary phase, and count that."""
        with self.work.call():
            return super().auxiliary_phase(iteration)
