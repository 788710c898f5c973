"""What a worker's process tells of itself, as Ray's metrics (`common.live_metrics`).

How long it was at work, what it did, the memory that it holds; again every few seconds, from a
thread of its own, also while a call lasts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from common.live_metrics import Live
from deploy.gauges import Gauges, Reading, own_readings


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose worker it is, for what it tells of itself."""

    run: str
    """Name of the run's folder."""
    role: str
    worker: str


class Work:
    """What a process has done since it began."""

    def __init__(self) -> None:
        self.calls = self.tokens = 0
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._since: float | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call, and the time that it takes."""
        begin = self._since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:  # what is read never falls
                self._since = None
                self._seconds += time.perf_counter() - begin
            self.calls += 1

    @property
    def seconds(self) -> float:
        """Time in calls, the one under way included; from any thread."""
        with self._lock:
            under_way = 0.0 if self._since is None else time.perf_counter() - self._since
            return self._seconds + under_way


class Told:
    """A mixin that tells what a worker does."""

    def __init__(self, identity: Identity, *args: Any, **settings: Any) -> None:
        self.identity, self.work = identity, Work()
        super().__init__(*args, **settings)
        self.gauges = Gauges(identity.run, self.readings)

    def __repr__(self) -> str:
        """Name run and worker, for Ray's dashboard and logs; it keeps what is said at the start."""
        return f"{self.identity.run}:{self.identity.worker}"

    def readings(self) -> list[Reading]:
        """Return what the process tells of itself; from any thread."""
        role, worker = self.identity.role, self.identity.worker
        return [
            Reading.of(Live.BUSY_SECONDS, self.work.seconds, role, worker),
            Reading.of(Live.CALLS, self.work.calls, role, worker),
            Reading.of(Live.TOKENS, self.work.tokens, role, worker),
            *own_readings(role, worker),
        ]


def response_tokens(tables: Sequence[pa.Table]) -> int:
    """Count the response tokens of tables of rollouts."""
    return sum(len(chunk.flatten()) for table in tables for chunk in table["response_ids"].chunks)
