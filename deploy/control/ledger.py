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

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from common.errors import TalipotError
from common.wire.trajectory import RolloutRequest
from deploy.control.leases import Entry, Lease, LeasesInFlight, State, lone
from deploy.control.settled import Settled

Dropped = Literal["dead letter", "lone", "no signal", "stale"]
"""Why a rollout is not trained."""
Resampled = Literal["late", "lost", "stale"]
"""Why a committed rollout is sampled again."""


class LedgerError(TalipotError):
    """The books do not balance: a bug of ours, never the user's."""


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
        self._leases = LeasesInFlight()
        self._failures: Counter[str] = Counter()
        """Workers in a row that a rollout in flight was lost with: by rollout, because leases are
        parted, put together and numbered anew."""
        self._settled = Settled()

    @property
    def in_flight(self) -> int:
        """Rollouts issued, and neither trained nor dropped."""
        return sum(self._leases.rollouts.values())

    @property
    def queued(self) -> int:
        """Leases waiting for a worker."""
        return self._leases.leases["queued"]

    def count(self, state: State) -> int:
        """Return the number of rollouts in a state."""
        return self._leases.rollouts[state]

    def holds(self, rollout_id: str) -> bool:
        """Return whether a rollout is in flight."""
        return rollout_id in self._leases

    def pending(self, iteration: int) -> int:
        """Return an iteration's rollouts that are queued or leased; 0 = nothing more is to come."""
        return self._leases.pending[iteration]

    # ------------------------------------------------------------------ before the commit

    def issue(
        self,
        iteration: int,
        requests: Sequence[RolloutRequest],
        lease_size: int,
        *,
        least: int = 1,
        first: bool = False,
    ) -> None:
        """Queue an iteration's requests as leases of fixed composition, or before others (`first`).

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
            if rollout_id in self._leases or rollout_id in self._settled:
                raise LedgerError(f"rollout {rollout_id} was issued twice")
        starts = range(0, len(requests), lease_size)
        for at in reversed(starts) if first else starts:
            part = [r for r in requests[at : at + lease_size] if r.rollout_id in ids]
            self._leases.cut(iteration, part, first=first)
        self.issued += len(ids)
        self._settled.expect(ids)

    def lease(self, holder: str, until: float) -> Lease:
        """Hand out the oldest waiting lease until a moment (seconds of the caller's clock).

        Raises IndexError when none waits.
        """
        return self._leases.hand_out(holder, until)

    def pass_on(self, lease_id: int, holder: str, until: float) -> None:
        """Give a leased lease another holder, or its holder another deadline."""
        entry = self._leases.lease(lease_id)
        if entry is not None and entry.state == "leased":
            self._leases.hold(entry, holder, until)

    def overdue(self, now: float) -> list[tuple[Lease, str]]:
        """Return leases whose time is over, and who holds them. They stay leased until given back.

        Each is returned once for each deadline that it is given.
        """
        return self._leases.pop_overdue(now)

    def give_back(self, lease_id: int, holder: str) -> None:
        """Put a lease back before the queue: its holder failed, left or was late.

        Nothing happens when it is another's by now, or committed.
        """
        entry = self._leases.lease(lease_id)
        if entry is not None and entry.state == "leased" and entry.holder == holder:
            self.reissued += 1
            self._leases.requeue(entry)

    def failed(self, lease: Lease) -> int:
        """Count a worker lost by this lease, as far as is known; returns how many in a row."""
        self._failures.update(i for i in lease.rollout_ids if i in self._leases)
        return self.failures(lease)

    def failures(self, lease: Lease) -> int:
        """Return how many workers in a row were lost by this lease, or by one it is a part of."""
        return max(self._failures[i] for i in lease.rollout_ids)

    def done(self, lease: Lease) -> None:
        """Forget the failures of a lease whose work was done: they were not the lease's fault."""
        for rollout_id in lease.rollout_ids:
            self._failures.pop(rollout_id, None)

    # ------------------------------------------------------------------ the commit and after

    def commit(self, rollout_ids: Iterable[str]) -> list[str]:
        """Accept rollouts, and return those that are accepted: all that no one committed before.

        The first commit of a rollout counts, also when its lease has gone back to the queue or to
        another holder. The others are counted in `refused`, and are to be discarded.

        Raises:
            LedgerError: a rollout was never issued, or a leased lease is committed in part.
        """
        by_lease: dict[int, tuple[Entry, set[str]]] = {}
        accepted = []
        late = 0
        for rollout_id in rollout_ids:
            entry = self._leases.of(rollout_id)
            if entry is not None and entry.state != "committed":
                by_lease.setdefault(entry.lease.lease_id, (entry, set()))[1].add(rollout_id)
                accepted.append(rollout_id)
            elif entry is not None or rollout_id in self._settled:
                late += 1
            else:
                raise LedgerError(f"rollout {rollout_id} was committed and never issued")
        for lease_id, (entry, ids) in by_lease.items():
            if entry.state == "leased" and ids != entry.unsettled:
                raise LedgerError(f"lease {lease_id} was committed with other rollouts than issued")
        for entry, ids in by_lease.values():
            self._leases.commit(entry, ids)
        self.refused += late
        return accepted

    def train(self, rollout_ids: Iterable[str]) -> None:
        """Settle committed rollouts that the learner has consumed."""
        self.trained += self._settle(rollout_ids, "trained", ("committed",))

    def drop(self, rollout_ids: Iterable[str], reason: Dropped) -> None:
        """Settle rollouts that will not be trained, for a stated reason.

        Committed ones may be dropped singly; of a queued or leased lease, all or none.
        """
        dropped = self._settle(rollout_ids, "dropped", ("queued", "leased", "committed"))
        if dropped:
            self.dropped[reason] += dropped

    def resample(self, rollout_ids: Iterable[str], reason: Resampled) -> None:
        """Put committed rollouts that cannot be trained as they are back to the queue.

        Raises:
            LedgerError: one is not committed, or only a part of a lease's are given.
        """
        for entry, ids in self._by_lease(rollout_ids, "sampled again", ("committed",)):
            if ids != entry.unsettled:
                raise LedgerError(f"lease {entry.lease.lease_id} is sampled again in part only")
            self.resampled[reason] += len(ids)
            self._leases.remove(entry)
            rest = [r for r in entry.lease.requests if r.rollout_id in ids]
            self._leases.cut(entry.lease.iteration, rest, first=True)

    # ------------------------------------------------------------------ going back in time

    def rewound(self, state: dict[str, Any] | None) -> Ledger:
        """Return books as `state` gave them (None: empty), with nothing in flight.

        Lease numbers go on where these stand, so that no number ever means two leases; and so do
        counts of what went wrong, which happened even though its history is no longer true.
        """
        ledger = Ledger() if state is None else Ledger.restore(state)
        ledger._leases.next_id = max(ledger._leases.next_id, self._leases.next_id)
        ledger._failures = self._failures
        ledger.reissued = max(ledger.reissued, self.reissued)
        ledger.refused = max(ledger.refused, self.refused)
        ledger.resampled |= self.resampled
        return ledger

    def adopt(self, lease: Lease, holder: str, until: float) -> None:
        """Enter a lease of the books before they were rewound, whose work goes on.

        It takes the place of the waiting leases of the same rollouts, so that no work is done
        twice. What those have beyond it (rollouts that these books do not know to be dropped)
        waits on.

        Raises:
            LedgerError: its rollouts are not all waiting here.
        """
        ids = set(lease.rollout_ids)
        covered = {entry.lease.lease_id: entry for i in ids if (entry := self._leases.of(i))}
        waiting = [covered[i] for i in sorted(covered) if covered[i].state == "queued"]
        if not ids <= set[str]().union(*(entry.unsettled for entry in waiting)):
            raise LedgerError(f"lease {lease.lease_id} under way is of rollouts not waiting")
        for entry in waiting:
            self._leases.remove(entry)
            if rest := tuple(r for r in entry.lease.requests if r.rollout_id not in ids):
                number = self._leases.next_id
                self._leases.add(replace(entry.lease, lease_id=number, requests=rest), first=True)
        self._leases.hold(self._leases.add(lease, state="leased"), holder, until)

    # ------------------------------------------------------------------ checks and checkpoints

    def check(self) -> None:
        """Raise LedgerError unless issued = trained + dropped + in flight."""
        accounted = self.trained + sum(self.dropped.values()) + self.in_flight
        if self.issued != accounted or self.in_flight != len(self._leases):
            raise LedgerError(f"{self.issued} rollouts issued, {accounted} accounted for")

    def state(self) -> dict[str, Any]:
        """Return the books for a checkpoint, checked. A resume issues again what is in flight."""
        self.check()
        rollouts = self._leases.rollouts
        return {
            "issued": self.issued - self.in_flight,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "reissued": self.reissued,
            "resampled": dict(self.resampled),
            "refused": self.refused,
            "in_flight": {state: rollouts[state] for state in sorted(rollouts)},
            "settled": self._settled.state(),
            "next_lease": self._leases.next_id,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Ledger:
        """Return books as `state` gave them, with nothing in flight.

        To keep rollouts that outlived a failure, issue their iteration again and commit them: a
        queued lease may be committed in part, and only the rest of it is then sampled.
        """
        ledger = cls()
        ledger.issued, ledger.trained = state["issued"], state["trained"]
        ledger.dropped, ledger.resampled = Counter(state["dropped"]), Counter(state["resampled"])
        ledger.reissued, ledger.refused = state["reissued"], state["refused"]
        ledger._settled = Settled.restore(state["settled"])
        ledger._leases.next_id = state["next_lease"]
        ledger.check()
        return ledger

    # ------------------------------------------------------------------ parts

    def _by_lease(
        self, rollout_ids: Iterable[str], what: str, states: Sequence[State]
    ) -> list[tuple[Entry, set[str]]]:
        """Group rollouts by their lease, all of them found in one of `states`."""
        groups: dict[int, tuple[Entry, set[str]]] = {}
        for rollout_id in rollout_ids:
            entry = self._leases.of(rollout_id)
            if entry is None or entry.state not in states:
                raise LedgerError(f"rollout {rollout_id} is {what} without a commit")
            groups.setdefault(entry.lease.lease_id, (entry, set()))[1].add(rollout_id)
        for lease_id, (entry, ids) in groups.items():
            if entry.state != "committed" and ids != entry.unsettled:
                raise LedgerError(f"lease {lease_id} is {what} in part only")
        return list(groups.values())

    def _settle(self, rollout_ids: Iterable[str], what: str, states: Sequence[State]) -> int:
        """Take rollouts out of flight for good; returns how many."""
        count = 0
        for entry, ids in self._by_lease(rollout_ids, what, states):
            self._leases.settle(entry, ids)
            for rollout_id in sorted(ids):
                self._failures.pop(rollout_id, None)
                self._settled.add(rollout_id, dropped=what == "dropped")
            count += len(ids)
        return count
