"""Calls that take too long, and leases that cost one worker after another.

A hung worker is found by the deadline of a call: that of its lease in the ledger, or here that of a
call whose result is no longer wanted. A lease that costs a worker three times in a row, by its
deadline or by the worker's death, would cost every worker: it ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from common.errors import WorkerError
from deploy.control.leases import Lease
from deploy.control.ledger import Ledger
from deploy.workers.pool import Pool

_TRIES = 3
"""Workers that a lease may cost in a row; with the last one the run ends."""


class Deadlines:
    """Finds hung workers, and blames the lease that a worker was lost with."""

    def __init__(self, pools: Sequence[Pool], seconds: float) -> None:
        self._pools = pools
        self._seconds = seconds
        self._void: dict[ray.ObjectRef[Any], tuple[str, float]] = {}
        """Calls whose results are thrown away: the worker, and until when it has time."""

    def from_now(self) -> float:
        """Return the deadline of a call that a worker begins now."""
        return time.monotonic() + self._seconds

    # ------------------------------------------------------------------ calls without a lease

    def void(self, call: ray.ObjectRef[Any], worker: str, until: float) -> None:
        """Note that a call's result is to be thrown away, and the deadline that it still has."""
        self._void[call] = worker, until

    def is_void(self, call: ray.ObjectRef[Any]) -> bool:
        """Return whether a call's result is to be thrown away."""
        return call in self._void

    def forget(self, call: ray.ObjectRef[Any]) -> bool:
        """Forget a call that has ended; returns whether its result is to be thrown away."""
        return self._void.pop(call, None) is not None

    # ------------------------------------------------------------------ hung workers, guilty leases

    def end_hung_workers(self, ledger: Ledger) -> None:
        """End workers whose deadline has passed; their calls then fail like those of a death.

        Raises:
            WorkerError: a lease has cost too many workers.
        """
        now = time.monotonic()
        late: dict[str, list[Lease]] = {}
        for lease, holder in ledger.overdue(now):
            late.setdefault(holder, []).append(lease)
        for worker, until in self._void.values():
            if until < now:
                late.setdefault(worker, [])
        why = f"no answer within {self._seconds:g} s (rollout.lease_deadline_s)"
        for worker, leases in late.items():
            at_work = f", at work on {leases[0].title}" if leases else ""
            try:
                lost = any(pool.lost(worker, "hung", why + at_work) for pool in self._pools)
            except WorkerError:
                # One failure too many for the pool; if it is a lease's third too, that says more.
                self.blame(ledger, leases, worker, f"hung: {why}")
                raise
            if lost:
                self.blame(ledger, leases, worker, f"hung: {why}")

    def blame(self, ledger: Ledger, leases: Sequence[Lease], worker: str, how: str) -> None:
        """Count the loss of a worker that was working on these leases.

        Raises:
            WorkerError: one of them costs every worker that gets it; named, with what to change.
        """
        for lease in leases:
            if ledger.failed(lease) >= _TRIES:
                hint = "".join(p.hint for p in self._pools if worker.startswith(f"{p.kind}-"))
                raise WorkerError(
                    f"{lease.title} cost {_TRIES} workers in a row, and would cost others; the "
                    f"last was {worker}, {how}. Raise rollout.lease_deadline_s if it takes longer "
                    "than that; lower rollout.cache_mb or reward_service.micro_batch_tokens if "
                    f"memory ran out{hint}"
                )
