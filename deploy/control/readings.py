"""What a controller tells of its run between the steps of the log, as Ray's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from common.live_metrics import Live
from common.metric_catalogue import Logged
from deploy.control.collector import Collector
from deploy.control.ledger import Dropped, Resampled
from deploy.gauges import Reading, own_readings
from deploy.health.watch import Watch
from deploy.run_folder.events import Cause
from deploy.workers.pool import Pool


def readings_of(
    collector: Collector, watch: Watch, *, restarts: int, progress: float
) -> list[Reading]:
    """Return what is true now; from any thread.

    Args:
        collector: knows the counts.
        watch: knows the run's health.
        restarts: of the learner, over the run.
        progress: unix seconds at which the last iteration ended, or policy training began.
    """
    found = [
        *own_readings("controller", "controller"),
        Reading.of(Live.ITERATION_END, progress),
        *watch.readings(),
    ]
    if collector.weights is None:
        return found  # counts that go on from a checkpoint are not there yet
    counts = known_counts(collector.pools) | collector.counts()
    counts[Logged.LEARNER_RESTARTS] = float(restarts)
    return [*found, *(Reading.logged("train", name, value) for name, value in counts.items())]


def known_counts(pools: Sequence[Pool]) -> dict[str, float]:
    """Return 0 for every count that a run may come to, by cause: what has not happened yet."""
    names = [Logged.LEARNER_RESTARTS, Logged.LEASES_REISSUED, Logged.LATE_COMMITS]
    names += [Logged.WEIGHTS_RELOADED]
    by_cause = [Logged.DROPPED.of(reason) for reason in get_args(Dropped)]
    by_cause += [Logged.RESAMPLED.of(reason) for reason in get_args(Resampled)]
    for pool in pools:
        by_cause += [Logged.WORKERS_LOST.of(pool.kind), Logged.WORKERS_DRAINED.of(pool.kind)]
        by_cause += [Logged.WORKERS_LOST_BY.of(pool.kind, cause) for cause in get_args(Cause)]
    return dict.fromkeys([*map(str, names), *by_cause], 0.0)
