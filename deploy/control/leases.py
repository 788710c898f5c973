"""Leases in flight: which wait, who holds the others and until when, how many rollouts they have.

Plain classes, no Ray. The ledger (`deploy.control.ledger`) decides what happens to a rollout; here
is the store that it keeps them in until they are settled. Every operation costs O(requests
touched).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from common.wire.trajectory import RolloutRequest

State = Literal["queued", "leased", "committed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A fixed group of requests: the unit of work, of reissue and of batching."""

    lease_id: int
    iteration: int
    requests: tuple[RolloutRequest, ...]

    @property
    def rollout_ids(self) -> tuple[str, ...]:
        """In the order of the requests."""
        return tuple(request.rollout_id for request in self.requests)

    @property
    def title(self) -> str:
        """What messages call it."""
        ids = self.rollout_ids
        return f"lease {self.lease_id} (rollouts {ids[0]} to {ids[-1]})"


@dataclass(slots=True)
class Entry:
    """A lease in flight."""

    lease: Lease
    state: State
    unsettled: set[str]
    """Its rollouts that are neither trained nor dropped."""
    holder: str = ""
    until: float = 0.0


@dataclass(slots=True)
class LeasesInFlight:
    """Leases of which something is neither trained nor dropped."""

    next_id: int = 0
    """Number of the next lease."""
    rollouts: Counter[State] = field(default_factory=Counter)
    leases: Counter[State] = field(default_factory=Counter)
    pending: Counter[int] = field(default_factory=Counter)
    """Rollouts queued or leased, by iteration."""
    _entries: dict[int, Entry] = field(default_factory=dict)
    _lease_of: dict[str, int] = field(default_factory=dict)
    """Lease of every rollout in flight."""
    _queue: deque[int] = field(default_factory=deque)
    """Lease ids, oldest first; not all are still queued."""
    _given_back: list[int] = field(default_factory=list)
    """Heap of lease ids that go before the queue; not all are still queued."""
    _deadlines: list[tuple[float, int]] = field(default_factory=list)
    """Heap of (until, lease id); not all are still valid."""

    def __len__(self) -> int:
        """Return the number of rollouts."""
        return len(self._lease_of)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._lease_of

    def lease(self, lease_id: int) -> Entry | None:
        """Return the entry of a lease; None where it is not in flight."""
        return self._entries.get(lease_id)

    def of(self, rollout_id: str) -> Entry | None:
        """Return the entry of a rollout's lease; None where it is not in flight."""
        lease_id = self._lease_of.get(rollout_id)
        return None if lease_id is None else self._entries[lease_id]

    # ------------------------------------------------------------------ whole leases

    def cut(
        self,
        iteration: int,
        requests: Sequence[RolloutRequest],
        *,
        state: State = "queued",
        first: bool = False,
    ) -> None:
        """Add a new lease of these requests; none where there is no request."""
        if requests:
            lease = Lease(lease_id=self.next_id, iteration=iteration, requests=tuple(requests))
            self.add(lease, state=state, first=first)

    def add(self, lease: Lease, *, state: State = "queued", first: bool = False) -> Entry:
        """Add a lease; a queued one to the end of the queue, or to its head (`first`)."""
        self.next_id = max(self.next_id, lease.lease_id + 1)
        ids = lease.rollout_ids
        entry = Entry(lease, state, set(ids))
        self._entries[lease.lease_id] = entry
        self._lease_of.update(dict.fromkeys(ids, lease.lease_id))
        self._count(entry, len(ids), 1)
        if state == "queued":
            (self._queue.appendleft if first else self._queue.append)(lease.lease_id)
        return entry

    def remove(self, entry: Entry) -> None:
        """Remove a lease, to add its requests anew."""
        self._count(entry, -len(entry.unsettled), -1)
        del self._entries[entry.lease.lease_id]
        for rollout_id in entry.unsettled:
            del self._lease_of[rollout_id]

    def hand_out(self, holder: str, until: float) -> Lease:
        """Lease out the oldest lease that was given back, or else the head of the queue.

        Raises:
            IndexError: no lease waits.
        """
        while True:
            back = self._given_back
            entry = self._entries.get(heapq.heappop(back) if back else self._queue.popleft())
            if entry is not None and entry.state == "queued":
                self._move(entry, "leased")
                self.hold(entry, holder, until)
                return entry.lease

    def hold(self, entry: Entry, holder: str, until: float) -> None:
        """Give a lease a holder and a deadline."""
        entry.holder, entry.until = holder, until
        if until < math.inf:
            heapq.heappush(self._deadlines, (until, entry.lease.lease_id))

    def requeue(self, entry: Entry) -> None:
        """Put a leased lease back, before the queue and before younger ones that were put back.

        A lease that cost a worker is thus tried again before what only waited behind it, so that
        one which costs every worker is soon known.
        """
        self._move(entry, "queued")
        heapq.heappush(self._given_back, entry.lease.lease_id)

    def pop_overdue(self, now: float) -> list[tuple[Lease, str]]:
        """Return leases whose deadline has passed, and their holders; each once per deadline."""
        overdue = []
        while self._deadlines and self._deadlines[0][0] < now:
            until, lease_id = heapq.heappop(self._deadlines)
            entry = self._entries.get(lease_id)
            if entry is not None and entry.state == "leased" and entry.until == until:
                overdue.append((entry.lease, entry.holder))
        return overdue

    # ------------------------------------------------------------------ parts of leases

    def commit(self, entry: Entry, ids: set[str]) -> None:
        """Mark rollouts of a lease as committed; the others of it wait to be sampled."""
        if ids == entry.unsettled:
            self._move(entry, "committed")
            return
        self.remove(entry)
        requests = [r for r in entry.lease.requests if r.rollout_id in entry.unsettled]
        iteration = entry.lease.iteration
        there = [r for r in requests if r.rollout_id in ids]
        missing = [r for r in requests if r.rollout_id not in ids]
        self.cut(iteration, there, state="committed")
        self.cut(iteration, missing, first=True)

    def settle(self, entry: Entry, ids: set[str]) -> None:
        """Take rollouts of a lease out of flight for good."""
        self._count(entry, -len(ids), 0)
        entry.unsettled -= ids
        for rollout_id in ids:
            del self._lease_of[rollout_id]
        if not entry.unsettled:
            self._count(entry, 0, -1)
            del self._entries[entry.lease.lease_id]

    # ------------------------------------------------------------------ counts

    def _move(self, entry: Entry, state: State) -> None:
        self._count(entry, -len(entry.unsettled), -1)
        entry.state, entry.holder, entry.until = state, "", 0.0
        self._count(entry, len(entry.unsettled), 1)

    def _count(self, entry: Entry, rollouts: int, leases: int) -> None:
        self.rollouts[entry.state] += rollouts
        self.leases[entry.state] += leases
        if entry.state != "committed":
            iteration = entry.lease.iteration
            self.pending[iteration] += rollouts
            if not self.pending[iteration]:
                del self.pending[iteration]


def lone(requests: Sequence[RolloutRequest], least: int) -> frozenset[str]:
    """Return rollouts of an iteration whose prompt has fewer than `least` responses among these.

    Where an estimator compares the responses of one prompt, these cannot be trained on.
    """
    size = Counter(request.group for request in requests)
    return frozenset(r.rollout_id for r in requests if size[r.group] < least)
