"""Workers that a run starts itself: they belong to its controller, and end with it."""

from __future__ import annotations

from common.config.run import RunConfig
from common.endings import take_all
from deploy.control.collector import Collector
from deploy.workers.gang import LearnerGang
from deploy.workers.pool import Pool
from deploy.workers.scaling import Elastic


class OwnWorkers:
    """Those of a run's workers that were not started when it began."""

    def __init__(
        self, config: RunConfig, gang: LearnerGang, collector: Collector, elastic: Elastic
    ) -> None:
        self._config, self._gang = config, gang
        self._collector, self._elastic = collector, elastic
        self._started: list[Pool | LearnerGang] = []

    def start(self) -> None:
        """Start what was not started yet, all at once."""
        sizes = self._config.rollout.actors_at_start, self._config.reward_service.replicas
        pools = self._collector.rollout, self._collector.reward
        for pool, size in zip(pools, sizes, strict=True):
            if pool is not None and not pool.workers:
                self._started.append(pool)
                pool.scale(size)
        self._elastic.introduce()
        self._elastic.request_room()
        if not self._gang.started:
            self._started.append(self._gang)
            self._gang.start(self._collector.tend)

    def end(self) -> None:
        """End what was started here, all of it; then raise what failed."""
        started, self._started = self._started, []
        take_all(*(each.stop for each in reversed(started)))
