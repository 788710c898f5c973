"""The ledger of rollout requests: what was issued, who holds it, what became of it.

Plain class, no Ray. Every request is in exactly one state::

    queued -> leased -> committed -> trained
       ^________|           |______-> dropped (reason)

Commits are idempotent: a second commit of a rollout is counted and refused. The conservation
equation (invariant I2) ``issued = trained + dropped + in flight`` is checked on demand.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import TalipotError
from common.trajectory import RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A fixed group of requests: the unit of work, of reissue and of batching."""

    lease_id: int
    iteration: int
    requests: tuple[RolloutRequest, ...]


class LedgerError(TalipotError):
    """The books do not balance: a bug of ours, never the user's."""


class Ledger:
    """Books of one run. All operations cost O(requests touched)."""

    def __init__(self) -> None:
        self.issued = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self.reissued = 0
        """Leases that went back to the queue because their worker died."""
        self.refused = 0
        """Rollouts committed a second time."""
        self._queue: deque[Lease] = deque()
        self._leased: dict[int, Lease] = {}
        self._open: set[str] = set()
        """rollout_ids queued or leased."""
        self._committed: set[str] = set()
        self._next = 0

    @property
    def in_flight(self) -> int:
        """Issued, and neither trained nor dropped."""
        return len(self._open) + len(self._committed)

    @property
    def queued(self) -> int:
        """Leases waiting for a worker."""
        return len(self._queue)

    def issue(self, iteration: int, requests: Sequence[RolloutRequest], lease_size: int) -> None:
        """Queue an iteration's requests as leases of fixed composition."""
        for at in range(0, len(requests), lease_size):
            part = tuple(requests[at : at + lease_size])
            self._queue.append(Lease(lease_id=self._next, iteration=iteration, requests=part))
            self._next += 1
            for request in part:
                if request.rollout_id in self._open or request.rollout_id in self._committed:
                    raise LedgerError(f"rollout {request.rollout_id} was issued twice")
                self._open.add(request.rollout_id)
        self.issued += len(requests)

    def lease(self) -> Lease:
        """Hand out the oldest waiting lease. Raises IndexError when none waits."""
        lease = self._queue.popleft()
        self._leased[lease.lease_id] = lease
        return lease

    def adopt(self, leases: Iterable[Lease]) -> None:
        """Leases under way take the places of the waiting ones of the same rollouts.

        For books that were rewound: what was in work then, and still is, is not done twice.
        """
        under_way = {lease.requests[0].rollout_id: lease for lease in leases}
        waiting = deque[Lease]()
        for lease in self._queue:
            mine = under_way.pop(lease.requests[0].rollout_id, None)
            if mine is None:
                waiting.append(lease)
            else:
                self._leased[mine.lease_id] = mine
        if under_way:
            raise LedgerError(f"{len(under_way)} leases under way are of rollouts never issued")
        self._queue = waiting

    def give_back(self, lease_id: int) -> None:
        """A worker failed: its lease goes to the head of the queue."""
        lease = self._leased.pop(lease_id, None)
        if lease is not None:
            self.reissued += 1
            self._queue.appendleft(lease)

    def commit(self, lease_id: int, rollout_ids: Iterable[str]) -> bool:
        """Accept a lease's rollouts; False (and counted) when it had been committed before.

        Raises:
            LedgerError: the rollouts are not those of the lease.
        """
        ids = list(rollout_ids)
        lease = self._leased.pop(lease_id, None)
        if lease is None:
            self.refused += len(ids)
            return False
        if [r.rollout_id for r in lease.requests] != ids:
            raise LedgerError(f"lease {lease_id} was committed with other rollouts than issued")
        self._open.difference_update(ids)
        self._committed.update(ids)
        return True

    def train(self, rollout_ids: Iterable[str]) -> None:
        """Committed rollouts were consumed by the learner."""
        ids = set(rollout_ids)
        if not ids <= self._committed:
            raise LedgerError(f"{len(ids - self._committed)} rollouts trained without a commit")
        self._committed -= ids
        self.trained += len(ids)

    def drop(self, rollout_ids: Iterable[str], reason: str) -> None:
        """Committed rollouts will not be trained, for a stated reason."""
        ids = set(rollout_ids)
        if not ids <= self._committed:
            raise LedgerError(f"{len(ids - self._committed)} rollouts dropped without a commit")
        self._committed -= ids
        self.dropped[reason] += len(ids)

    def check(self) -> None:
        """Raise LedgerError unless issued = trained + dropped + in flight."""
        accounted = self.trained + sum(self.dropped.values()) + self.in_flight
        if self.issued != accounted:
            raise LedgerError(f"{self.issued} rollouts issued, {accounted} accounted for")

    def state(self) -> dict[str, Any]:
        """Totals for a checkpoint. What is in flight is issued again on resume."""
        self.check()
        return {
            "issued": self.issued - self.in_flight,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "reissued": self.reissued,
            "refused": self.refused,
            "next_lease": self._next,
        }

    def rewound(self, state: dict[str, Any] | None) -> Ledger:
        """Books as `state` gave them (None: empty), with nothing in flight.

        Lease numbers go on where these stand, so that no number ever means two leases.
        """
        ledger = Ledger() if state is None else Ledger.restore(state)
        ledger._next = max(ledger._next, self._next)
        return ledger

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Ledger:
        """Books as `state` gave them, with nothing in flight."""
        ledger = cls()
        ledger.issued, ledger.trained = state["issued"], state["trained"]
        ledger.dropped = Counter(state["dropped"])
        ledger.reissued, ledger.refused = state["reissued"], state["refused"]
        ledger._next = state["next_lease"]
        ledger.check()
        return ledger
