"""Elastic workers: individual Ray actors that may come, go and die at any time.

The pool knows which workers there are, in which state, and how they were lost::

    starting --answers--> working --scaled down, or node to be drained--> draining --idle--> left
        '----------------------'---- died, hung, preempted ----> replaced by a new one

`tend` is the one loop. It consumes: a wish for a size (`scale`, from any thread), answers to
probes, notices of nodes that will leave. Produces: new workers, and the end of those that are too
many. Waits for: nothing. Called from the loop that hands out work, and only there.

The pool does not know what its workers work on. Whoever called one (`deploy.control.collector`)
fetches the answer with `result`, and gives the work of a lost worker to another. A worker gets work
once it has answered for the first time, so that one which waits for room delays nothing.

All times are seconds of the monotonic clock, whatever is done to the wall clock; only an `Event`,
which is for people, has the date.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import ray

from common.endings import take_all
from common.errors import ClusterError, TalipotError, WorkerError
from deploy.run_folder.events import Cause
from deploy.workers.calls import (
    Answer,
    ArgumentLost,
    WorkerLost,
    kill,
    own_error,
    start_function,
    summary,
)
from deploy.workers.hosted import whereabouts
from deploy.workers.losses import Losses
from deploy.workers.worker import ClusterQueries, Event, MakeWorker, Worker

_NODE_DIED = "its node has died"
"""What Ray's message says of an actor that did not end by itself."""
_LOOK_S = 1.0
"""How often draining nodes are looked for."""
_LEAVE_S = 2.0
"""So long before its node leaves, a draining worker's work is handed back."""


def _no_report(event: Event) -> None:
    """Ignore an event, where nobody listens."""


@dataclass(slots=True, kw_only=True)
class Pool:
    """Workers of one kind."""

    kind: str
    make: MakeWorker
    max_failures: int
    """Failures that are allowed within `window_s` or since a call came back, beside one for each
    worker."""
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
    cluster: ClusterQueries = field(default_factory=ClusterQueries)
    report: Callable[[Event], None] = _no_report
    workers: dict[str, Worker] = field(default_factory=dict)
    target: int = 0
    """Workers there are to be."""
    left: int = 0
    """Workers that left after draining."""
    scale_seconds: float = 0.0
    """From the last command that added workers to the first result of one of them."""
    _losses: Losses = field(default_factory=Losses)
    _commanded: float | None = None
    """When workers were added by a command of which none has answered yet."""
    _looked: float = -math.inf
    """When leaving nodes were looked for last."""
    _next_number: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_sent": time.monotonic()} | {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Move every time to this machine's clock: that of another machine has another zero."""
        by = time.monotonic() - state.pop("_sent")
        for name, value in state.items():
            setattr(self, name, value)
        self._commanded = None if self._commanded is None else self._commanded + by
        self._looked += by
        self._losses.shift(by)
        for worker in self.workers.values():
            worker.shift(by)

    @property
    def losses(self) -> Counter[str]:
        """Workers lost over the pool's life, by cause."""
        return self._losses.by_cause

    @property
    def failures(self) -> int:
        """Workers lost over the pool's life."""
        return sum(self.losses.values())

    # ------------------------------------------------------------------ asked from outside

    def scale(self, size: int) -> int:
        """Wish for a size, from any thread; `tend` brings it about. Returns the last wish."""
        before = self.target
        self._commanded = time.monotonic() if self.workers and size > before else None
        self.target = size  # last: the loop may look at any moment
        return before

    def able(self, depth: int) -> list[Worker]:
        """Return working workers with fewer than `depth` calls under way."""
        return [w for w in self.workers.values() if w.state == "working" and w.busy < depth]

    def free(self, depth: int) -> Worker | None:
        """Return the least busy of these, if any."""
        return min(self.able(depth), key=lambda w: (w.busy, w.name), default=None)

    def probes(self) -> list[ray.ObjectRef[tuple[str, int]]]:
        """Return the answers that are waited for."""
        return [w.probe for w in self.workers.values() if w.probe is not None]

    def result(self, ref: ray.ObjectRef[Answer], name: str) -> Answer:
        """Return what a worker's finished call answered, and take note of what came of it.

        Raises:
            WorkerLost: the worker is no more.
            ArgumentLost: what it was to work on is no more; the worker itself is well.
            TalipotError: what the worker raised.
        """
        try:
            answer = ray.get(ref)
        except (ray.exceptions.RayTaskError, ray.exceptions.ObjectLostError) as error:
            self.succeeded(name)
            own = own_error(error)
            if isinstance(own, TalipotError):
                raise own from None
            causes = (error, getattr(error, "cause", None))
            if any(isinstance(cause, ray.exceptions.ObjectLostError) for cause in causes):
                raise ArgumentLost from None
            raise
        except ray.exceptions.RayError as error:
            reason = summary(error)
            cause = self.lost(name, "died", reason)
            # Ray soon knows the death of a process; that of a lost node it may not know yet.
            unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
            elsewhere = unreachable or _NODE_DIED in str(error)
            raise WorkerLost(reason, by_itself=cause == "died" and not elsewhere) from None
        self.succeeded(name)
        return answer

    def succeeded(self, name: str) -> None:
        """Note that a worker's call came back."""
        now = time.monotonic()
        self._losses.succeed(now)
        worker = self.workers.get(name)
        if worker is None:
            return
        worker.busy -= 1
        worker.heard = now
        if worker.command is not None:
            if worker.command == self._commanded:
                self.scale_seconds = worker.heard - worker.command
                self._commanded = None
            worker.command = None

    def lost(self, name: str, cause: Cause, detail: str) -> Cause | None:
        """Kill a failed worker, to be replaced.

        Returns:
            What it was lost by, as it is counted; None when it was lost or had left already.

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
        recent = self._losses.fail(now, self.window_s)
        if recent > self.max_failures + self.target:
            raise WorkerError(
                f"{recent} {self.kind} workers failed within {self.window_s:.0f} s, or "
                f"since one of them did anything (cluster.max_restarts); the last was {name}, "
                f"{cause}: {detail}{self.hint}"
            )
        self._losses.back_off(now)
        return cause

    def stop(self) -> None:
        """End all workers; then raise what could not be reported."""
        self.target = 0
        take_all(*(partial(self._remove, name, "stopped", "") for name in list(self.workers)))

    # ------------------------------------------------------------------ the loop

    def tend(self) -> None:
        """Bring the pool nearer to its size, and find lost workers; see the head of the file.

        Raises:
            WorkerError: too many failures.
            ConfigError: a worker cannot be built from this recipe.
            ClusterError: a worker lacks the memory that it needs, or no worker works and one that
                was asked for has been given no place.
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
        worker.probe = start_function(worker.handle, whereabouts)
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
                if isinstance(refusal := own_error(error), TalipotError):
                    raise refusal from None
                cause: Cause = "unstarted" if worker.state == "starting" else "died"
                self.lost(worker.name, cause, summary(error))
                continue
            if worker.state == "starting":
                worker.state = "working"
                self._tell(worker.name, "started", f"after {now - worker.asked:.1f} s")

    def _look_for_leaving_nodes(self, now: float) -> None:
        if now < self._looked + _LOOK_S:
            return
        self._looked = now
        leaving = self.cluster.leaving_nodes()
        for worker in self.workers.values():
            if worker.node in leaving and worker.leave_by == math.inf:
                worker.state, worker.leave_by = "draining", leaving[worker.node]
                self._tell(worker.name, "draining", f"node {worker.node[:8]} will go")

    def _settle_size(self, now: float) -> None:
        target = self.target  # which another thread may change at any moment
        staying = [w for w in self.workers.values() if w.state != "draining"]
        if len(staying) > target:
            # Those go first that would be missed least; of equals the newest.
            staying.sort(key=lambda w: (w.state == "working", w.busy, -w.asked))
            for worker in staying[: len(staying) - target]:
                worker.state = "draining"
                self._tell(worker.name, "draining", f"scaled to {target}")
            return
        missing = target - len(staying)
        for worker in list(self.workers.values()):
            if missing and worker.state == "draining" and worker.leave_by == math.inf:
                worker.state, missing = ("working" if worker.node else "starting"), missing - 1
        if now >= self._losses.replace_at:
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
        why = self.cluster.why_unplaced(worker.handle)
        if not why:
            self.lost(worker.name, "hung", f"has not started within {self.start_s:.0f} s")
            return
        self._tell(worker.name, "waiting", why)
        worker.waits, worker.probe_until = True, now + self.start_s
        if all(w.waits and w.state == "starting" for w in self.workers.values()):
            raise ClusterError(
                f"{worker.name} has not started within {self.start_s:.0f} s "
                f"(cluster.start_timeout_s), and no {self.kind} worker works: {why}"
            )

    # ------------------------------------------------------------------ parts

    def _add(self, now: float) -> None:
        name = f"{self.kind}-{self._next_number}"
        self._next_number += 1
        worker = Worker(name=name, handle=self.make(name), asked=now, command=self._commanded)
        self.workers[name] = worker
        self._ask(worker, now + self.start_s)

    def _remove(self, name: str, what: str, detail: str) -> None:
        kill(self.workers.pop(name).handle)
        self._tell(name, what, detail)

    def _tell(self, worker: str, what: str, detail: str) -> None:
        self.report(Event.now(worker, what, detail))
