"""Elastic workers: individual Ray actors that may come, go and die at any time.

The pool knows which workers there are, in which state, and how they were lost::

    starting --answers--> working --scaled down, or node to be drained--> draining --idle--> gone
        '----------------------'---- died, hung, preempted ----> replaced by a new one

`tend` is the one loop. It consumes: a wish for a size (`scale`, from any thread), answers to
probes, notices of nodes that will leave. Produces: new workers, and the end of those that are too
many. Waits for: nothing. Called from the loop that hands out work, and only there.

What workers were working on is the business of whoever submitted it (`deploy.control.collector`):
it reports a failed call with `lost`, and gives the work to another. A worker gets work once it has
answered for the first time, so that one which waits for room holds nothing up.

All times are seconds of the monotonic clock, whatever is done to the wall clock; an `Event` alone,
which is for people, bears the date.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import ray

from common.endings import take_all
from common.errors import ClusterError, TalipotError, WorkerError
from deploy.workers.gang import plain
from deploy.workers.hosted import whereabouts

MakeWorker = Callable[[str], Any]
"""Name -> actor handle; where resources are placed."""

State = Literal["starting", "working", "draining"]
Cause = Literal["died", "hung", "unstarted", "preempted", "corrupt"]

_LOOK_S = 1.0
"""How often draining nodes are looked for."""
_LEAVE_S = 2.0
"""So long before its node goes, a draining worker's work is handed back."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 30.0
"""Backoff before a lost worker is replaced."""


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
        """An event of this moment."""
        return cls(time=time.time(), worker=worker, what=what, detail=detail)


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker."""

    name: str
    handle: Any
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
    """When its node will go."""
    probe: ray.ObjectRef[Any] | None = None
    probe_until: float = math.inf
    waits: bool = False
    """It was reported once that it has no place to start at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a pool asks about the cluster it lives in; `deploy.workers.placement` answers."""

    leaving: Callable[[], Mapping[str, float]]
    """Nodes that will go, and when."""
    waiting_for: Callable[[Any], str]
    """Why an actor (by its handle) has no place yet; empty when it has one."""


def _no_report(event: Event) -> None:
    """Where nobody listens."""


ALONE = Surroundings(leaving=dict, waiting_for=lambda handle: "")
"""Nothing is known of the cluster: a node that goes is a death."""


@dataclass(slots=True, kw_only=True)
class Pool:
    """Workers of one kind."""

    kind: str
    make: MakeWorker
    max_failures: int
    """Failures within `window_s` or since a call came back, beside one for each worker, that are
    outlived."""
    window_s: float = 600.0
    silence_s: float = 300.0
    """An idle worker that does not answer for so long is hung."""
    beat_s: float = 5.0
    """An idle worker is asked this often whether it is there."""
    start_s: float = 120.0
    """A worker that has a place and does not answer for so long is hung; one that has none is
    reported, and ends the run when no other works or may start."""
    hint: str = ""
    """What the error of too many failures adds: what else may end these workers."""
    around: Surroundings = ALONE
    report: Callable[[Event], None] = _no_report
    workers: dict[str, Worker] = field(default_factory=dict)
    target: int = 0
    """Workers there are to be."""
    losses: Counter[str] = field(default_factory=Counter)
    """Workers lost over the pool's life, by cause."""
    left: int = 0
    """Workers that left after draining."""
    scale_seconds: float = 0.0
    """From the last command that added workers to the first result of one of them."""
    _commanded: float | None = None
    _recent: deque[float] = field(default_factory=deque)
    """Times of the failures that count."""
    _worked: float = -math.inf
    """When a call came back last."""
    _backoff: float = 0.0
    _not_before: float = -math.inf
    _looked: float = -math.inf
    _made: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_sent": time.monotonic()} | {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The clock of another machine has another zero: every time is moved to this one's."""
        by = time.monotonic() - state.pop("_sent")
        for name, value in state.items():
            setattr(self, name, value)
        self._recent = deque(at + by for at in self._recent)
        self._commanded = None if self._commanded is None else self._commanded + by
        self._worked += by
        self._not_before += by
        self._looked += by
        for worker in self.workers.values():
            worker.asked += by
            worker.heard += by
            worker.leave_by += by
            worker.probe_until += by
            worker.command = None if worker.command is None else worker.command + by

    @property
    def failures(self) -> int:
        """Workers lost over the pool's life."""
        return sum(self.losses.values())

    # ------------------------------------------------------------------ asked from outside

    def scale(self, size: int) -> int:
        """Wish for a size, from any thread; `tend` makes it so. Returns the size wished before."""
        before = self.target
        self._commanded = time.monotonic() if self.workers and size > before else None
        self.target = size  # last: the loop may look at any moment
        return before

    def able(self, depth: int) -> list[Worker]:
        """Working workers with fewer than `depth` calls under way."""
        return [w for w in self.workers.values() if w.state == "working" and w.busy < depth]

    def free(self, depth: int) -> Worker | None:
        """The least busy of these, if any."""
        return min(self.able(depth), key=lambda w: (w.busy, w.name), default=None)

    def probes(self) -> list[ray.ObjectRef[Any]]:
        """Answers that are waited for."""
        return [w.probe for w in self.workers.values() if w.probe is not None]

    def succeeded(self, name: str) -> None:
        """A call came back."""
        self._backoff = 0.0
        self._worked = time.monotonic()
        worker = self.workers.get(name)
        if worker is None:
            return
        worker.busy -= 1
        worker.heard = self._worked
        if worker.command is not None:
            if worker.command == self._commanded:
                self.scale_seconds = worker.heard - worker.command
                self._commanded = None
            worker.command = None

    def lost(self, name: str, cause: Cause, detail: str) -> Cause | None:
        """Kill a failed worker, to be replaced. Returns what it was lost by, as it is counted; None
        when it was lost or gone already.

        Raises:
            WorkerError: too many failures within the window, or without a success between them,
                with the last one's cause.
        """
        worker = self.workers.get(name)
        if worker is None:
            return None
        now = time.monotonic()
        if cause == "died" and worker.leave_by < math.inf:
            cause = "preempted"
        self.losses[cause] += 1
        self._remove(name, cause, detail)
        if cause == "preempted":
            return cause  # Nothing is wrong with a worker whose node was taken away.
        self._recent.append(now)
        # Failures without one success between them are one trouble, however slowly they come.
        while self._recent[0] < min(now - self.window_s, self._worked):
            self._recent.popleft()
        if len(self._recent) > self.max_failures + self.target:
            raise WorkerError(
                f"{len(self._recent)} {self.kind} workers failed within {self.window_s:.0f} s, or "
                f"since one of them did anything (cluster.max_restarts); the last was {name}, "
                f"{cause}: {detail}{self.hint}"
            )
        if now >= self._not_before:  # Losses during one wait are one event: a node that died.
            self._backoff = min(_LONGEST_WAIT_S, max(_FIRST_WAIT_S, 2.0 * self._backoff))
            self._not_before = now + self._backoff
        return cause

    def stop(self) -> None:
        """End all workers; what cannot be reported of it is raised after."""
        self.target = 0
        take_all(*(partial(self._remove, name, "stopped", "") for name in list(self.workers)))

    # ------------------------------------------------------------------ the loop

    def tend(self) -> None:
        """Bring the pool nearer to what it should be; see the head of the file.

        Raises:
            WorkerError: too many failures.
            ConfigError: a worker cannot be made of this recipe.
            ClusterError: a worker has not the memory that it needs, or no worker works, and one
                that was asked for has been given no place.
        """
        now = time.monotonic()
        self._take_answers(now)
        self._look_for_leaving_nodes(now)
        self._settle_size(now)
        for worker in list(self.workers.values()):
            if worker.state == "draining":
                self._let_go(worker, now)
            elif worker.probe is not None and now > worker.probe_until:
                self._silent(worker, now)
            elif worker.probe is None and not worker.busy and now > worker.heard + self.beat_s:
                self._ask(worker, now + self.silence_s)

    def _ask(self, worker: Worker, until: float) -> None:
        worker.probe = worker.handle.__ray_call__.remote(whereabouts)
        worker.probe_until = until

    def _take_answers(self, now: float) -> None:
        asked = {w.probe: w for w in self.workers.values() if w.probe is not None}
        if not asked:
            return
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        for ref in ready:
            worker = asked[ref]
            worker.probe, worker.heard = None, now
            try:
                worker.node, worker.pid = ray.get(ref)
            except ray.exceptions.RayError as error:
                if isinstance(refusal := plain(error), TalipotError):
                    raise refusal from None
                cause: Cause = "unstarted" if worker.state == "starting" else "died"
                self.lost(worker.name, cause, last_words(error))
                continue
            if worker.state == "starting":
                worker.state = "working"
                self._say(worker.name, "started", f"after {now - worker.asked:.1f} s")

    def _look_for_leaving_nodes(self, now: float) -> None:
        if now < self._looked + _LOOK_S:
            return
        self._looked = now
        leaving = self.around.leaving()
        for worker in self.workers.values():
            if worker.node in leaving and worker.leave_by == math.inf:
                worker.state, worker.leave_by = "draining", leaving[worker.node]
                self._say(worker.name, "draining", f"node {worker.node[:8]} will go")

    def _settle_size(self, now: float) -> None:
        target = self.target  # which another thread may change at any moment
        staying = [w for w in self.workers.values() if w.state != "draining"]
        if len(staying) > target:
            # Those go first that would be missed least; of equals the newest.
            staying.sort(key=lambda w: (w.state == "working", w.busy, -w.asked))
            for worker in staying[: len(staying) - target]:
                worker.state = "draining"
                self._say(worker.name, "draining", f"scaled to {target}")
            return
        missing = target - len(staying)
        for worker in list(self.workers.values()):
            if missing and worker.state == "draining" and worker.leave_by == math.inf:
                worker.state, missing = ("working" if worker.node else "starting"), missing - 1
        if now >= self._not_before:
            for _ in range(missing):
                self._add(now)

    def _let_go(self, worker: Worker, now: float) -> None:
        if not worker.busy:
            self.left += 1
            self._remove(worker.name, "left", "")
        elif now > worker.leave_by - _LEAVE_S:
            self.lost(worker.name, "preempted", "its node goes, and its work was not done")

    def _silent(self, worker: Worker, now: float) -> None:
        if worker.state == "working":
            self.lost(worker.name, "hung", f"idle, and no answer within {self.silence_s:.0f} s")
            return
        why = self.around.waiting_for(worker.handle)
        if not why:
            self.lost(worker.name, "hung", f"has not started within {self.start_s:.0f} s")
            return
        self._say(worker.name, "waiting", why)
        worker.waits, worker.probe_until = True, now + self.start_s
        if all(w.waits and w.state == "starting" for w in self.workers.values()):
            raise ClusterError(
                f"{worker.name} has not started within {self.start_s:.0f} s "
                f"(cluster.start_timeout_s), and no {self.kind} worker works: {why}"
            )

    # ------------------------------------------------------------------ parts

    def _add(self, now: float) -> None:
        name = f"{self.kind}-{self._made}"
        self._made += 1
        worker = Worker(name=name, handle=self.make(name), asked=now, command=self._commanded)
        self.workers[name] = worker
        self._ask(worker, now + self.start_s)

    def _remove(self, name: str, what: str, detail: str) -> None:
        # Ray kills a stopped (SIGSTOP) process too: SIGKILL follows within seconds.
        ray.kill(self.workers.pop(name).handle)
        self._say(name, what, detail)

    def _say(self, worker: str, what: str, detail: str) -> None:
        self.report(Event.now(worker, what, detail))


def last_words(error: Exception) -> str:
    """What happened, out of Ray's long message: its first line, its last, and no guesses."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    found = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return found.partition(" Some common causes include")[0]
