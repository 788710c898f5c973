"""What happened in a run, counted from its beginning: no restart or resume takes a count back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from deploy.control.ledger import Ledger
from deploy.workers.pool import Pool


class Tally:
    """Counts by the names of their metrics.

    A process counts its own: what its pools lost, what its workers report. What was counted before
    it comes from the checkpoint that the run is resumed from.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self._before: Counter[str] | None = None
        self._reported: Counter[str] = Counter({"weights_reloaded": 0})

    def add(self, reported: Mapping[str, int]) -> None:
        """What a worker reports to have happened since its last report."""
        for name, count in reported.items():  # a count of 0 is shown too
            self._reported[name] += count

    def carry_on(self, counted: Mapping[str, int]) -> None:
        """Take up what a checkpoint says was `counted`.

        Of the first checkpoint that a process restores: what it counted itself since has happened,
        though the learner goes back behind it.
        """
        if self._before is None:
            self._before = Counter(counted)

    def counted(self) -> dict[str, int]:
        """Everything so far, as a checkpoint keeps it; from any thread."""
        found = Counter(self._before or {})
        found.update(dict(self._reported))
        for pool in self._pools:
            lost = f"workers_lost/{pool.kind}"
            found.update({lost: pool.failures})
            found.update({f"{lost}/{cause}": n for cause, n in dict(pool.losses).items()})
            if pool.left:
                found.update({f"workers_drained/{pool.kind}": pool.left})
        return dict(found)

    @property
    def failures(self) -> int:
        """Workers lost."""
        counted = self.counted()
        return sum(counted[f"workers_lost/{pool.kind}"] for pool in self._pools)

    def metrics(self, ledger: Ledger) -> dict[str, float]:
        """All counts, those of the books, and how many workers there are now; from any thread."""
        found: dict[str, float] = {
            "leases_reissued": ledger.reissued,
            "late_commits": ledger.refused,
        }
        found |= {f"dropped/{reason}": n for reason, n in dict(ledger.dropped).items()}
        found |= {f"resampled/{reason}": n for reason, n in dict(ledger.resampled).items()}
        found |= self.counted()
        for pool in self._pools:
            found[f"workers/{pool.kind}"] = len(pool.workers)
            if pool.scale_seconds:
                found[f"scale_seconds/{pool.kind}"] = pool.scale_seconds
        return found
