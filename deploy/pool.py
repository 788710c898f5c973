"""Elastic workers: individual Ray actors that may die at any time and are replaced.

The pool knows which workers live and how often they failed. What they were working on is the
business of whoever submitted it (`deploy.collector`): a failed call is answered with `replace`,
and the work goes to another worker. Backoff is exponential; too many failures end the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from common.errors import WorkerError

MakeWorker = Callable[[str], Any]
"""Name -> actor handle; where resources are placed."""


@dataclass(slots=True)
class Worker:
    """One living worker."""

    name: str
    handle: Any
    busy: int = 0
    """Calls under way."""
    ready_at: float = 0.0
    """Not before this (monotonic seconds): backoff after a failure."""


@dataclass(slots=True)
class Pool:
    """Workers of one kind."""

    kind: str
    make: MakeWorker
    max_failures: int
    """Failures without a success in between that end the run."""
    workers: dict[str, Worker] = field(default_factory=dict)
    failures: int = 0
    """Workers lost over the pool's life."""
    _streak: int = 0
    _made: int = 0

    def scale(self, size: int) -> None:
        """Grow to `size` workers at once, or retire idle ones down to it."""
        while len(self.workers) < size:
            self._add(0.0)
        idle = [w for w in self.workers.values() if not w.busy]
        for worker in idle[: max(0, len(self.workers) - size)]:
            self._remove(worker.name)

    def free(self, depth: int) -> Worker | None:
        """The least busy worker with fewer than `depth` calls under way, if any."""
        now = time.monotonic()
        able = [w for w in self.workers.values() if w.busy < depth and w.ready_at <= now]
        return min(able, key=lambda w: (w.busy, w.name)) if able else None

    def succeeded(self, worker: str) -> None:
        """A call came back."""
        self._streak = 0
        if worker in self.workers:
            self.workers[worker].busy -= 1

    def replace(self, worker: str, cause: str) -> bool:
        """Kill a failed worker and start another; False when it had been replaced already.

        Raises:
            WorkerError: too many failures in a row, with the last one's cause.
        """
        if worker not in self.workers:
            return False
        self._remove(worker)
        self.failures += 1
        self._streak += 1
        if self._streak > self.max_failures:
            raise WorkerError(
                f"{self._streak} {self.kind} workers failed in a row; the last was {worker}: "
                f"{cause}"
            )
        backoff = min(30.0, 0.1 * 2.0 ** (self._streak - 1))
        self._add(time.monotonic() + backoff)
        return True

    def stop(self) -> None:
        """End all workers."""
        for name in list(self.workers):
            self._remove(name)

    def _add(self, ready_at: float) -> None:
        name = f"{self.kind}-{self._made}"
        self._made += 1
        self.workers[name] = Worker(name=name, handle=self.make(name), ready_at=ready_at)

    def _remove(self, name: str) -> None:
        ray.kill(self.workers.pop(name).handle)
