"""What workers did: counts from the run's beginning, and rates since the last iteration.

No restart or resume takes a count back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from actors.rollout_actor import LeaseFacts
from common.metric_catalogue import Logged
from deploy.control.ledger import Ledger
from deploy.workers.pool import Pool
from reward_service.service import ScoreFacts


class Tally:
    """Counts by the names of their metrics.

    A process counts its own: what its pools lost, what its workers report. What was counted before
    it comes from the checkpoint that the run is resumed from.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self._before: Counter[str] | None = None
        self._reported: Counter[str] = Counter({Logged.WEIGHTS_RELOADED: 0})

    def add(self, reported: Mapping[str, int]) -> None:
        """Add what a worker reports to have happened since its last report."""
        for name, count in reported.items():  # a count of 0 is shown too
            self._reported[name] += count

    @property
    def reported(self) -> dict[str, int]:
        """What workers reported to this process."""
        return dict(self._reported)

    def carry_on(self, counted: Mapping[str, int]) -> None:
        """Take up what a checkpoint says was `counted`.

        Only the first checkpoint that a process restores counts: what the process has counted
        since then has happened, even where the learner goes back to an earlier iteration.
        """
        if self._before is None:
            self._before = Counter(counted)

    def counted(self) -> dict[str, int]:
        """Return all counts so far, as a checkpoint keeps them; from any thread."""
        counts = Counter(self._before or {})
        counts.update(dict(self._reported))
        for pool in self._pools:
            kind, losses = pool.kind, dict(pool.losses)
            counts.update({Logged.WORKERS_LOST.of(kind): pool.failures})
            counts.update({Logged.WORKERS_LOST_BY.of(kind, c): n for c, n in losses.items()})
            if pool.left:
                counts.update({Logged.WORKERS_DRAINED.of(kind): pool.left})
        return dict(counts)

    @property
    def failures(self) -> int:
        """Workers lost."""
        counted = self.counted()
        return sum(counted[Logged.WORKERS_LOST.of(pool.kind)] for pool in self._pools)

    def metrics(self, ledger: Ledger) -> dict[str, float]:
        """Return all counts, the books' too, and how many workers there are; from any thread."""
        metrics: dict[str, float] = {
            Logged.LEASES_REISSUED: ledger.reissued,
            Logged.LATE_COMMITS: ledger.refused,
        }
        metrics |= {Logged.DROPPED.of(reason): n for reason, n in dict(ledger.dropped).items()}
        metrics |= {Logged.RESAMPLED.of(reason): n for reason, n in dict(ledger.resampled).items()}
        metrics |= self.counted()
        for pool in self._pools:
            metrics[Logged.WORKERS.of(pool.kind)] = len(pool.workers)
            if pool.scale_seconds:
                metrics[Logged.SCALE_SECONDS.of(pool.kind)] = pool.scale_seconds
        return metrics


class Throughput:
    """Sums of what workers report, until they are read."""

    def __init__(self) -> None:
        self._tokens = 0
        self._generate_s = self._load_s = self._score_s = 0.0
        self._weights = self._cache = 0

    def sampled(self, facts: LeaseFacts) -> None:
        """Add what a rollout actor reports of a lease."""
        self._tokens += facts.response_tokens
        self._generate_s += facts.seconds
        self._load_s += facts.load_seconds
        self._weights = max(self._weights, facts.memory.get("weights", 0))
        self._cache = max(self._cache, facts.memory.get("cache", 0))

    def scored(self, facts: ScoreFacts) -> None:
        """Add what a reward worker reports of a call."""
        self._score_s += facts.seconds

    def read(self) -> dict[str, float]:
        """Return the metrics, and begin anew."""
        metrics: dict[str, float] = {
            Logged.TOKENS_PER_SECOND: self._tokens / max(self._generate_s, 1e-9),
            Logged.GENERATE_SECONDS: self._generate_s,
            Logged.LOAD_SECONDS: self._load_s,
            Logged.SCORE_SECONDS: self._score_s,
            Logged.ACTOR_WEIGHTS: self._weights,
            Logged.ACTOR_CACHE: self._cache,
        }
        self._tokens = self._weights = self._cache = 0
        self._generate_s = self._load_s = self._score_s = 0.0
        return metrics
