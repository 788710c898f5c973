"""The elastic side of a run: its sizes by command and by policy, its workers, their events.

Called from the controller. `scale` and `views` may be called from any thread: they set a wish, or
read; the loop that hands out work does the rest (`deploy.workers.pool`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from common.config.run import RunConfig
from common.endings import take_all
from common.errors import StorageError
from common.metric_catalogue import Logged
from deploy.run_folder.log_lines import cut_torn_end
from deploy.workers.autoscale import Load, Trend, decide
from deploy.workers.placement import release_room, request_room
from deploy.workers.pool import Pool
from deploy.workers.worker import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """What a command to scale changes."""

    kind: str
    was: int
    """Workers wished for before."""
    will_be: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as `talipot status` shows it."""

    name: str
    state: str
    calls: int
    """Under way at it."""
    node: str
    pid: int


class Elastic:
    """The pools of one run: their sizes and their events."""

    def __init__(self, config: RunConfig, rollout: Pool, reward: Pool | None) -> None:
        self._config = config
        self._pools = [rollout] if reward is None else [rollout, reward]
        self._rollout = rollout
        self._trend = Trend()
        self._events = config.folder.events
        cut_torn_end(self._events)
        for pool in self._pools:
            pool.report = self._report

    def scale(self, actors: int | None, replicas: int | None) -> list[Scaled]:
        """Wish for other sizes; None leaves one as it is. Returns at once.

        Raises:
            StorageError: the wish holds, but could not be written to events.jsonl.
        """
        scaled = []
        for pool, size in zip(self._pools, (actors, replicas), strict=False):
            if size is not None:
                scaled.append(Scaled(kind=pool.kind, was=pool.scale(size), will_be=size))
        events = [Event.now(s.kind, "scaled", f"from {s.was} to {s.will_be}") for s in scaled]
        take_all(self.request_room, *(partial(self._report, event) for event in events))
        return scaled

    def adapt(self, metrics: Mapping[str, float]) -> None:
        """Choose the number of actors after an iteration, where the recipe gives bounds."""
        bounds = self._config.rollout.actors
        if isinstance(bounds, int):
            return
        seconds, size = metrics[Logged.SECONDS], self._rollout.target
        busy = metrics[Logged.GENERATE_SECONDS] + metrics[Logged.LOAD_SECONDS]
        load = Load(
            learner_waits=metrics[Logged.COLLECT_SECONDS] / seconds,
            actors_busy=busy / (seconds * size),
        )
        wanted, self._trend = decide(size, bounds, load, self._trend)
        if wanted != size:
            self.scale(wanted, None)

    def introduce(self) -> None:
        """Report the workers that were at work before this run had its pools."""
        for pool in self._pools:
            for worker in pool.workers.values():
                if worker.state == "working":
                    self._report(Event.now(worker.name, "started", "before policy training"))

    def request_room(self) -> None:
        """Ask a cluster that autoscales for room for everything that is wished for."""
        if self._config.cluster.autoscales:
            actors, *replicas = [pool.target for pool in self._pools]
            request_room(self._config, actors, sum(replicas))

    def release_room(self) -> None:
        """Let an autoscaling cluster take back what it was asked for."""
        if self._config.cluster.autoscales:
            release_room()

    def views(self) -> list[WorkerView]:
        """Return all workers that there are."""
        return [
            WorkerView(name=w.name, state=w.state, calls=w.busy, node=w.node, pid=w.pid)
            for pool in self._pools
            for w in list(pool.workers.values())
        ]

    def _report(self, event: Event) -> None:
        """Append a line to events.jsonl: which worker started, left or was lost, and why."""
        try:
            with Path(self._events).open("a", encoding="utf8") as file:
                file.write(json.dumps(asdict(event)) + "\n")
        except OSError as error:
            raise StorageError(f"{self._events}: cannot be written: {error}") from None
