"""One elastic worker as its pool knows it, what happens to it, and what is asked of its cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import ray

from deploy.workers.calls import Handle

MakeWorker = Callable[[str], Handle]
"""Name -> the actor of that name; where resources are placed."""

State = Literal["starting", "working", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a worker; a line of the run's events.jsonl."""

    time: float
    """Unix seconds."""
    worker: str
    what: str
    """started, draining, left, waiting, stopped, scaled (the pool), or the cause of its loss."""
    detail: str = ""

    @classmethod
    def now(cls, worker: str, what: str, detail: str) -> Event:
        """Return an event of this moment."""
        return cls(time=time.time(), worker=worker, what=what, detail=detail)


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker."""

    name: str
    handle: Handle
    asked: float
    """When it was asked for."""
    command: float | None
    """When the command came that it was added for; None when it replaces another."""
    state: State = "starting"
    busy: int = 0
    """Calls under way."""
    node: str = ""
    pid: int = 0
    heard: float = 0.0
    """Last sign of life."""
    leave_by: float = math.inf
    """When its node will leave."""
    probe: ray.ObjectRef[tuple[str, int]] | None = None
    probe_until: float = math.inf
    waits: bool = False
    """It was reported once that it has no place to start at."""

    def shift(self, by: float) -> None:
        """Move all times to a clock with another zero."""
        self.asked += by
        self.heard += by
        self.leave_by += by
        self.probe_until += by
        self.command = None if self.command is None else self.command + by


def _none_leave() -> Mapping[str, float]:
    return {}


def _is_placed(handle: Handle) -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterQueries:
    """What a pool asks about its cluster; `deploy.workers.placement` answers.

    By default nothing is known: then the end of a node is the death of its workers.
    """

    leaving_nodes: Callable[[], Mapping[str, float]] = _none_leave
    """Nodes that will leave, and when."""
    why_unplaced: Callable[[Handle], str] = _is_placed
    """Why an actor has no place yet; empty when it has one."""
