"""The ledger of rollout requests: what was issued, who holds it, what became of it.

Plain class, no Ray. Every request is in exactly one state::

    queued <-> leased (to whom, until when) -> committed -> trained
       |          |                                |
       '----------'--------------------------------'-----> dropped (reason)

A lease goes back to the queue when its holder is lost, hands it back or outruns its time, and a
committed one when its rollouts were lost or grew stale. Commits are by `rollout_id`, whoever makes
them: the first counts, any later one is counted as late and discarded. The conservation equation
(invariant I2) ``issued = trained + dropped + in flight`` is checked on demand.

Every operation costs O(requests touched), whatever was issued before. What is settled (trained or
dropped) is kept as ranges, so that a late commit is still known for what it is after millions.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from common.errors import TalipotError
from common.wire.trajectory import RolloutRequest
from deploy.control.groups import lone
from deploy.control.settled import Settled

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


class LedgerError(TalipotError):
    """The books do not balance: a bug of ours, never the user's."""


@dataclass(slots=True)
class _Entry:
    """A lease in flight."""

    lease: Lease
    state: State = "queued"
    holder: str = ""
    until: float = 0.0
    unsettled: set[str] = field(default_factory=set)
    """Its rollouts that are neither trained nor dropped."""


class Ledger:
    """Books of one run."""

    def __init__(self) -> None:
        self.issued = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self.reissued = 0
        """Leases that went back to the queue because their holder failed, left or was late."""
        self.resampled: Counter[str] = Counter()
        """Committed rollouts that went back to the queue, by reason."""
        self.refused = 0
        """Rollouts committed a second time, and discarded."""
        self._queue: deque[int] = deque()
        """Lease ids, oldest first; some may be queued no more."""
        self._entries: dict[int, _Entry] = {}
        self._lease_of: dict[str, int] = {}
        """Lease of every rollout in flight."""
        self._deadlines: list[tuple[float, int]] = []
        """Heap of (until, lease id); some are out of date."""
        self._rollouts: Counter[State] = Counter()
        self._leases: Counter[State] = Counter()
        self._pending: Counter[int] = Counter()
        """Rollouts queued or leased, by iteration."""
        self._failures: Counter[str] = Counter()
        """Workers in a row that a rollout in flight was lost with: by rollout, because leases are
        parted, put together and numbered anew."""
        self._settled = Settled()
        self._next = 0

    @property
    def in_flight(self) -> int:
        """Rollouts issued, and neither trained nor dropped."""
        return sum(self._rollouts.values())

    @property
    def queued(self) -> int:
        """Leases waiting for a worker."""
        return self._leases["queued"]

    def count(self, state: State) -> int:
        """Rollouts in a state."""
        return self._rollouts[state]

    def holds(self, rollout_id: str) -> bool:
        """Whether a rollout is in flight."""
        return rollout_id in self._lease_of

    def pending(self, iteration: int) -> int:
        """Rollouts of an iteration that are queued or leased; 0 = nothing more is to come."""
        return self._pending[iteration]

    # ------------------------------------------------------------------ before the commit

    def issue(
        self, iteration: int, requests: Sequence[RolloutRequest], lease_size: int, *, least: int = 1
    ) -> None:
        """Queue an iteration's requests as leases of fixed composition.

        An iteration that was in flight in restored books is issued again as a whole; what had been
        dropped of it stays dropped. Leases are cut from all requests, before what is dropped is
        taken out of them: so they are composed as they were when it was issued first. Where too
        little is left, `least` responses of not a single prompt, all of it is issued once more:
        otherwise it could never be trained.

        Raises:
            LedgerError: a request was issued before; none of these is then.
        """
        prefixes = {request.rollout_id.rpartition("-")[0] for request in requests}
        new = [r for r in requests if not self._settled.in_open_prefix(r.rollout_id)]
        if len(lone(new, least)) == len(new) and self._settled.reopen(prefixes):
            new = list(requests)
        ids = {request.rollout_id for request in new}
        for rollout_id in ids:
            if rollout_id in self._lease_of or rollout_id in self._settled:
                raise LedgerError(f"rollout {rollout_id} was issued twice")
        for at in range(0, len(requests), lease_size):
            part = tuple(r for r in requests[at : at + lease_size] if r.rollout_id in ids)
            if part:
                self._enter(Lease(lease_id=self._next, iteration=iteration, requests=part))
        self.issued += len(ids)
        self._settled.expect(ids)

    def lease(self, holder: str, until: float) -> Lease:
        """Hand out the oldest waiting lease until a moment (seconds of the caller's clock).

        Raises IndexError when none waits.
        """
        while True:
            entry = self._entries.get(self._queue.popleft())
            if entry is not None and entry.state == "queued":
                self._move(entry, "leased")
                self._hold(entry, holder, until)
                return entry.lease

    def pass_on(self, lease_id: int, holder: str, until: float) -> None:
        """A leased lease has another holder, or its holder another deadline."""
        entry = self._entries.get(lease_id)
        if entry is not None and entry.state == "leased":
            self._hold(entry, holder, until)

    def overdue(self, now: float) -> list[tuple[Lease, str]]:
        """Leases whose time is over, and who holds them. They stay leased until given back."""
        found = []
        while self._deadlines and self._deadlines[0][0] < now:
            until, lease_id = heapq.heappop(self._deadlines)
            entry = self._entries.get(lease_id)
            if entry is not None and entry.state == "leased" and entry.until == until:
                found.append((entry.lease, entry.holder))
        return found

    def give_back(self, lease_id: int, holder: str) -> None:
        """The holder failed, left or was late: the lease goes to the head of the queue.

        Nothing happens when it is another's by now, or committed.
        """
        entry = self._entries.get(lease_id)
        if entry is not None and entry.state == "leased" and entry.holder == holder:
            self.reissued += 1
            self._move(entry, "queued")
            self._queue.appendleft(lease_id)

    def failed(self, lease: Lease) -> int:
        """A worker was lost by this lease, as far as is known; returns how many in a row."""
        self._failures.update(i for i in lease.rollout_ids if i in self._lease_of)
        return self.failures(lease)

    def failures(self, lease: Lease) -> int:
        """Workers in a row that were lost by this lease, or by one that it is a part of."""
        return max(self._failures[i] for i in lease.rollout_ids)

    def done(self, lease: Lease) -> None:
        """A worker did what a lease asks of it: what failed before was not the lease's fault."""
        for rollout_id in lease.rollout_ids:
            self._failures.pop(rollout_id, None)

    # ------------------------------------------------------------------ the commit and after

    def commit(self, rollout_ids: Iterable[str]) -> list[str]:
        """Accept rollouts, and return those that are accepted: all that no one committed before.

        The first commit of a rollout counts, also when its lease has gone back to the queue or to
        another holder. The others are counted in `refused`, and are to be discarded.

        Raises:
            LedgerError: a rollout was never issued, or a lease in work is committed in part.
        """
        by_lease: dict[int, set[str]] = {}
        accepted = []
        late = 0
        for rollout_id in rollout_ids:
            lease_id = self._lease_of.get(rollout_id)
            if lease_id is not None and self._entries[lease_id].state != "committed":
                by_lease.setdefault(lease_id, set()).add(rollout_id)
                accepted.append(rollout_id)
            elif lease_id is not None or rollout_id in self._settled:
                late += 1
            else:
                raise LedgerError(f"rollout {rollout_id} was committed and never issued")
        for lease_id, ids in by_lease.items():
            if (
                self._entries[lease_id].state == "leased"
                and ids != self._entries[lease_id].unsettled
            ):
                raise LedgerError(f"lease {lease_id} was committed with other rollouts than issued")
        for lease_id, ids in by_lease.items():
            self._commit_lease(self._entries[lease_id], ids)
        self.refused += late
        return accepted

    def train(self, rollout_ids: Iterable[str]) -> None:
        """Committed rollouts were consumed by the learner."""
        self.trained += self._settle(rollout_ids, "trained", ("committed",))

    def drop(self, rollout_ids: Iterable[str], reason: str) -> None:
        """Rollouts will not be trained, for a stated reason.

        Committed ones may be dropped singly; of a lease that is queued or in work, all or none.
        """
        dropped = self._settle(rollout_ids, "dropped", ("queued", "leased", "committed"))
        if dropped:
            self.dropped[reason] += dropped

    def resample(self, rollout_ids: Iterable[str], reason: str) -> None:
        """Committed rollouts that cannot be trained as they are go back to the queue.

        Raises:
            LedgerError: one is not committed, or only a part of a lease's are given.
        """
        for entry, ids in self._by_lease(rollout_ids, "sampled again", ("committed",)):
            if ids != entry.unsettled:
                raise LedgerError(f"lease {entry.lease.lease_id} is sampled again in part only")
            self.resampled[reason] += len(ids)
            self._close(entry)
            rest = tuple(r for r in entry.lease.requests if r.rollout_id in ids)
            lease = Lease(lease_id=self._next, iteration=entry.lease.iteration, requests=rest)
            self._enter(lease, first=True)

    # ------------------------------------------------------------------ going back in time

    def rewound(self, state: dict[str, Any] | None) -> Ledger:
        """Books as `state` gave them (None: empty), with nothing in flight.

        Lease numbers go on where these stand, so that no number ever means two leases; and so do
        counts of what went wrong, which happened though it is of a history that is no more.
        """
        ledger = Ledger() if state is None else Ledger.restore(state)
        ledger._next = max(ledger._next, self._next)
        ledger._failures = self._failures
        ledger.reissued = max(ledger.reissued, self.reissued)
        ledger.refused = max(ledger.refused, self.refused)
        ledger.resampled |= self.resampled
        return ledger

    def adopt(self, lease: Lease, holder: str, until: float) -> None:
        """A lease of the books before they were rewound goes on in these.

        It takes the place of the waiting leases of the same rollouts: what is in work is not done
        twice. What those have beyond it (rollouts that these books do not know to be dropped)
        waits on.

        Raises:
            LedgerError: its rollouts are not all waiting here.
        """
        ids = set(lease.rollout_ids)
        covered = sorted({self._lease_of.get(rollout_id, -1) for rollout_id in ids})
        entries = [self._entries.get(lease_id) for lease_id in covered]
        waiting = [e for e in entries if e is not None and e.state == "queued"]
        if not ids <= set[str]().union(*(e.unsettled for e in waiting)):
            raise LedgerError(f"lease {lease.lease_id} under way is of rollouts not waiting")
        for entry in waiting:
            self._close(entry)
            if rest := tuple(r for r in entry.lease.requests if r.rollout_id not in ids):
                self._enter(replace(entry.lease, lease_id=self._next, requests=rest), first=True)
        self._enter(lease, state="leased")
        self._hold(self._entries[lease.lease_id], holder, until)

    # ------------------------------------------------------------------ checks and checkpoints

    def check(self) -> None:
        """Raise LedgerError unless issued = trained + dropped + in flight."""
        accounted = self.trained + sum(self.dropped.values()) + self.in_flight
        if self.issued != accounted or self.in_flight != len(self._lease_of):
            raise LedgerError(f"{self.issued} rollouts issued, {accounted} accounted for")

    def state(self) -> dict[str, Any]:
        """The books for a checkpoint, checked. What is in flight is issued again on resume."""
        self.check()
        return {
            "issued": self.issued - self.in_flight,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "reissued": self.reissued,
            "resampled": dict(self.resampled),
            "refused": self.refused,
            "in_flight": {state: self._rollouts[state] for state in sorted(self._rollouts)},
            "settled": self._settled.state(),
            "next_lease": self._next,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Ledger:
        """Books as `state` gave them, with nothing in flight.

        To keep rollouts that outlived a failure, issue their iteration again and commit them: a
        queued lease may be committed in part, and only the rest of it is then sampled.
        """
        ledger = cls()
        ledger.issued, ledger.trained = state["issued"], state["trained"]
        ledger.dropped, ledger.resampled = Counter(state["dropped"]), Counter(state["resampled"])
        ledger.reissued, ledger.refused = state["reissued"], state["refused"]
        ledger._settled = Settled.restore(state["settled"])
        ledger._next = state["next_lease"]
        ledger.check()
        return ledger

    # ------------------------------------------------------------------ parts

    def _enter(self, lease: Lease, *, first: bool = False, state: State = "queued") -> None:
        """Put a new lease on the books."""
        self._next = max(self._next, lease.lease_id + 1)
        ids = lease.rollout_ids
        entry = _Entry(lease=lease, state=state, unsettled=set(ids))
        self._entries[lease.lease_id] = entry
        self._lease_of.update(dict.fromkeys(ids, lease.lease_id))
        self._tally(entry, len(ids), 1)
        if state == "queued":
            (self._queue.appendleft if first else self._queue.append)(lease.lease_id)

    def _tally(self, entry: _Entry, rollouts: int, leases: int) -> None:
        self._rollouts[entry.state] += rollouts
        self._leases[entry.state] += leases
        if entry.state != "committed":
            iteration = entry.lease.iteration
            self._pending[iteration] += rollouts
            if not self._pending[iteration]:
                del self._pending[iteration]

    def _hold(self, entry: _Entry, holder: str, until: float) -> None:
        entry.holder, entry.until = holder, until
        if until < math.inf:
            heapq.heappush(self._deadlines, (until, entry.lease.lease_id))

    def _move(self, entry: _Entry, state: State) -> None:
        self._tally(entry, -len(entry.unsettled), -1)
        entry.state, entry.holder, entry.until = state, "", 0.0
        self._tally(entry, len(entry.unsettled), 1)

    def _close(self, entry: _Entry) -> None:
        """Take a lease off the books, to enter its requests anew."""
        self._tally(entry, -len(entry.unsettled), -1)
        del self._entries[entry.lease.lease_id]
        for rollout_id in entry.unsettled:
            del self._lease_of[rollout_id]

    def _commit_lease(self, entry: _Entry, ids: set[str]) -> None:
        if ids == entry.unsettled:
            self._move(entry, "committed")
            return
        # Parted into what is there and what is still to be sampled.
        self._close(entry)
        requests = [r for r in entry.lease.requests if r.rollout_id in entry.unsettled]
        states: tuple[State, State] = ("committed", "queued")
        for state in states:
            part = tuple(r for r in requests if (r.rollout_id in ids) is (state == "committed"))
            lease = Lease(lease_id=self._next, iteration=entry.lease.iteration, requests=part)
            self._enter(lease, first=True, state=state)

    def _by_lease(
        self, rollout_ids: Iterable[str], what: str, states: Sequence[State]
    ) -> list[tuple[_Entry, set[str]]]:
        """Rollouts grouped by their lease, all of them found in one of `states`."""
        groups: dict[int, set[str]] = {}
        for rollout_id in rollout_ids:
            lease_id = self._lease_of.get(rollout_id)
            if lease_id is None or self._entries[lease_id].state not in states:
                raise LedgerError(f"rollout {rollout_id} is {what} without a commit")
            groups.setdefault(lease_id, set()).add(rollout_id)
        found = [(self._entries[lease_id], ids) for lease_id, ids in groups.items()]
        for entry, ids in found:
            if entry.state != "committed" and ids != entry.unsettled:
                raise LedgerError(f"lease {entry.lease.lease_id} is {what} in part only")
        return found

    def _settle(self, rollout_ids: Iterable[str], what: str, states: Sequence[State]) -> int:
        """Take rollouts out of flight for good; returns how many."""
        count = 0
        for entry, ids in self._by_lease(rollout_ids, what, states):
            self._tally(entry, -len(ids), 0)
            entry.unsettled -= ids
            for rollout_id in sorted(ids):
                del self._lease_of[rollout_id]
                self._failures.pop(rollout_id, None)
                self._settled.add(rollout_id, dropped=what == "dropped")
            if not entry.unsettled:
                self._tally(entry, 0, -1)
                del self._entries[entry.lease.lease_id]
            count += len(ids)
        return count
