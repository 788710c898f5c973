"""The ledger: every rollout in exactly one state, whatever happens in whatever order."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.wire.trajectory import RolloutRequest
from deploy.control.leases import Lease
from deploy.control.ledger import Ledger, LedgerError


def requests(iteration: int, count: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            rollout_id=f"{iteration:06d}-{i:06d}",
            group=i,
            prompt_uid="u",
            prompt_text="t",
            prompt_ids=[1],
            seed=i,
        )
        for i in range(count)
    ]


class Books(RuleBasedStateMachine):
    """Random operations against a plain table of every rollout's state, kept beside the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.iteration = 0
        self.now = 0.0
        self.state: dict[str, str] = {}
        self.held: dict[int, tuple[Lease, str, float]] = {}
        self.seen: list[Lease] = []
        self.refused = 0
        self.count = 0

    def those(self, *states: str) -> list[str]:
        return sorted(r for r, state in self.state.items() if state in states)

    @rule(count=st.integers(1, 7), size=st.integers(1, 4))
    def issue(self, count: int, size: int) -> None:
        made = requests(self.iteration, count)
        self.ledger.issue(self.iteration, made, size)
        self.state |= {request.rollout_id: "queued" for request in made}
        self.iteration += 1

    @precondition(lambda self: self.ledger.queued)
    @rule(time=st.integers(1, 5))
    def lease(self, time: int) -> None:
        self.count += 1
        holder = f"worker-{self.count}"
        lease = self.ledger.lease(holder, self.now + time)
        self.held[lease.lease_id] = (lease, holder, self.now + time)
        self.seen.append(lease)
        for rollout_id in lease.rollout_ids:
            if self.state[rollout_id] != "dropped":  # alone, of a lease parted or sampled again
                assert self.state[rollout_id] == "queued"
                self.state[rollout_id] = "leased"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), right=st.booleans())
    def give_back(self, data: st.DataObject, right: bool) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.held)))
        lease, holder, _ = self.held[lease_id]
        self.ledger.give_back(lease_id, holder if right else "somebody else")
        if right:
            del self.held[lease_id]
            self.state |= {i: "queued" for i in lease.rollout_ids if self.state[i] == "leased"}

    @precondition(lambda self: self.held)
    @rule(data=st.data(), time=st.integers(1, 5))
    def pass_on(self, data: st.DataObject, time: int) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.held)))
        self.ledger.pass_on(lease_id, "scorer", self.now + time)
        self.held[lease_id] = (self.held[lease_id][0], "scorer", self.now + time)

    @rule(time=st.integers(1, 9))
    def time_passes(self, time: int) -> None:
        self.now += time
        late = {i: (lease, who) for i, (lease, who, until) in self.held.items() if until < self.now}
        found = {lease.lease_id: (lease, who) for lease, who in self.ledger.overdue(self.now)}
        assert found == late
        for lease, holder in found.values():
            self.ledger.give_back(lease.lease_id, holder)
            del self.held[lease.lease_id]
            self.state |= {i: "queued" for i in lease.rollout_ids if self.state[i] == "leased"}

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """By whoever ever held the lease, however late: the first counts."""
        lease = data.draw(st.sampled_from(self.seen))
        first = [i for i in lease.rollout_ids if self.state[i] in ("queued", "leased")]
        assert self.ledger.commit(lease.rollout_ids) == first
        self.refused += len(lease.rollout_ids) - len(first)
        self.state |= dict.fromkeys(first, "committed")
        self.held.pop(lease.lease_id, None)

    @precondition(lambda self: self.those("committed"))
    @rule(data=st.data(), drop=st.booleans())
    def consume(self, data: st.DataObject, drop: bool) -> None:
        some = data.draw(st.sets(st.sampled_from(self.those("committed")), min_size=1))
        if drop:
            self.ledger.drop(some, "test")
        else:
            self.ledger.train(some)
        self.state |= dict.fromkeys(some, "dropped" if drop else "trained")

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop_what_is_leased(self, data: st.DataObject) -> None:
        lease, _, _ = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        open_ = [i for i in lease.rollout_ids if self.state[i] == "leased"]
        self.ledger.drop(open_, "given up")
        self.state |= dict.fromkeys(open_, "dropped")

    @invariant()
    def books_balance(self) -> None:
        self.ledger.check()
        assert self.ledger.issued == len(self.state)
        assert self.ledger.trained == len(self.those("trained"))
        assert sum(self.ledger.dropped.values()) == len(self.those("dropped"))
        assert self.ledger.refused == self.refused
        for state in ("queued", "leased", "committed"):
            assert self.ledger.count(state) == len(self.those(state)), state
        assert self.ledger.in_flight == len(self.those("queued", "leased", "committed"))
        for iteration in range(self.iteration):
            waiting = [i for i in self.those("queued", "leased") if int(i[:6]) == iteration]
            assert self.ledger.pending(iteration) == len(waiting)

    @invariant()
    def a_restored_ledger_knows_what_is_settled(self) -> None:
        restored = Ledger.restore(json.loads(json.dumps(self.ledger.state())))
        assert (restored.trained, restored.in_flight) == (self.ledger.trained, 0)
        settled = self.those("trained", "dropped")
        assert restored.commit(settled) == []
        assert restored.refused == self.refused + len(settled)


TestBooks = Books.TestCase


def test_a_lease_given_back_is_the_next_one() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 6), 2)
    first = ledger.lease("a", 1.0)
    ledger.give_back(first.lease_id, "a")
    assert ledger.lease("b", 1.0) == first
    assert ledger.reissued == 1


def test_the_oldest_lease_given_back_is_the_next_one() -> None:
    """Whatever the order in which a lost worker's calls fail: what it worked on goes before what
    waited behind it."""
    ledger = Ledger()
    ledger.issue(0, requests(0, 8), 2)
    at_work, waiting = ledger.lease("a", 1.0), ledger.lease("a", 9.0)
    for lease in (at_work, waiting):
        ledger.give_back(lease.lease_id, "a")
    assert [ledger.lease("b", 9.0) for _ in range(3)][:2] == [at_work, waiting]
    for lease in (waiting, at_work):
        ledger.give_back(lease.lease_id, "b")
    assert [ledger.lease("c", 9.0) for _ in range(2)] == [at_work, waiting]
    ledger.check()


def test_the_first_commit_counts_whoever_makes_it() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 2), 2)
    slow = ledger.lease("slow", 1.0)
    assert ledger.overdue(2.0) == [(slow, "slow")]
    ledger.give_back(slow.lease_id, "slow")
    again = ledger.lease("quick", 9.0)
    assert ledger.commit(slow.rollout_ids) == list(slow.rollout_ids), "late, and the first"
    assert ledger.commit(again.rollout_ids) == []
    ledger.train(slow.rollout_ids)
    assert ledger.commit(again.rollout_ids) == [], "trained: still known"
    assert (ledger.trained, ledger.refused, ledger.in_flight) == (2, 4, 0)
    assert not ledger.queued


def test_committed_rollouts_may_be_sampled_again() -> None:
    ledger = Ledger()
    ledger.issue(3, requests(3, 4), 2)
    ids = [i for _ in range(2) for i in ledger.lease("a", 1.0).rollout_ids]
    ledger.commit(ids)
    ledger.drop(ids[:1], "dead letter")
    with pytest.raises(LedgerError, match="in part only"):
        ledger.resample(ids[2:3], "stale")
    ledger.resample(ids[1:], "stale")
    assert ledger.resampled == {"stale": 3}
    assert ledger.pending(3) == 3
    again = [i for _ in range(2) for i in ledger.lease("b", 1.0).rollout_ids]
    assert sorted(again) == sorted(ids[1:]), "what was dropped stays dropped"
    assert ledger.commit(ids) == ids[1:]


def test_rollouts_that_outlived_a_failure_are_kept() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 4), 2)
    ledger.issue(1, requests(1, 4), 2)
    for _ in range(3):
        ledger.commit(ledger.lease("a", 1.0).rollout_ids)
    ledger.drop(["000001-000000"], "dead letter")
    books = json.loads(json.dumps(ledger.state()))
    assert books["in_flight"] == {"committed": 5, "leased": 0, "queued": 2}

    after = Ledger.restore(books)
    for iteration in (0, 1):
        after.issue(iteration, requests(iteration, 4), 2)
    assert after.issued == 8, "the dead letter stays dropped and is not issued again"
    kept = ["000000-000000", "000000-000001", "000000-000003", "000001-000001"]
    assert after.commit(kept) == kept
    rest = [after.lease("b", 1.0).rollout_ids for _ in range(after.queued)]
    assert sorted(i for ids in rest for i in ids) == [
        "000000-000002",
        "000001-000002",
        "000001-000003",
    ]
    after.check()


def compositions(ledger: Ledger) -> list[list[int]]:
    """Numbers of the rollouts of every waiting lease, in the order they are handed out."""
    found = []
    for at in range(ledger.queued):
        found.append([int(i[-6:]) for i in ledger.lease(f"w{at}", math.inf).rollout_ids])
    return found


def drop(ledger: Ledger, iteration: int, *numbers: int) -> None:
    """Commit everything that waits, and drop some of it."""
    while ledger.queued:
        ledger.commit(ledger.lease("a", math.inf).rollout_ids)
    ledger.drop([f"{iteration:06d}-{number:06d}" for number in numbers], "dead letter")


def restored(ledger: Ledger) -> Ledger:
    return Ledger.restore(json.loads(json.dumps(ledger.state())))


def test_leases_are_composed_the_same_whenever_they_are_issued() -> None:
    """Dropped rollouts are missing from theirs, and no other is moved up."""
    ledger = Ledger()
    ledger.issue(0, requests(0, 12), 4)
    drop(ledger, 0, 1, 4, 5, 6, 7)
    after = restored(ledger)
    after.issue(0, requests(0, 12), 4)
    assert after.issued == 12
    assert compositions(after) == [[0, 2, 3], [8, 9, 10, 11]]


def test_a_lease_under_way_goes_on_beside_what_was_dropped_before_it() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 8), 4)
    ledger.commit(ledger.lease("a", math.inf).rollout_ids)
    ledger.drop(["000000-000001"], "dead letter")
    under_way = ledger.lease("b", math.inf)
    books = ledger.rewound(json.loads(json.dumps(ledger.state())))
    books.issue(0, requests(0, 8), 4)
    books.adopt(under_way, "b", 9.0)
    assert books.overdue(10.0) == [(under_way, "b")]
    assert compositions(books) == [[0, 2, 3]]
    books.check()


def test_what_restored_books_do_not_know_to_be_dropped_waits_beside_a_lease_under_way() -> None:
    """Dropped after the checkpoint, and the rest of its lease sampled again since."""
    ledger = Ledger()
    ledger.issue(0, requests(0, 4), 4)
    ids = ledger.lease("a", math.inf).rollout_ids
    ledger.commit(ids)
    ledger.drop(ids[1:2], "dead letter")
    ledger.resample([ids[0], *ids[2:]], "lost")
    under_way = ledger.lease("b", math.inf)
    books = ledger.rewound(None)
    books.issue(0, requests(0, 4), 4)
    books.adopt(under_way, "b", math.inf)
    assert compositions(books) == [[1]]
    books.check()
    with pytest.raises(LedgerError, match="not waiting"):
        books.adopt(under_way, "b", math.inf)


@pytest.mark.parametrize(("dead", "least"), [((0, 1, 2, 3), 1), ((0, 2), 2)])
def test_an_iteration_of_which_nothing_can_be_trained_is_issued_once_more(
    dead: tuple[int, ...], least: int
) -> None:
    """Whoever resumes has mended the endpoint; what stayed dropped could never be trained."""

    def paired(iteration: int) -> list[RolloutRequest]:
        made = requests(iteration, 4)
        return [replace(request, group=at // 2) for at, request in enumerate(made)]

    ledger = Ledger()
    ledger.issue(0, paired(0), 2)
    ledger.issue(1, paired(1), 2)
    while ledger.queued:
        ledger.commit(ledger.lease("a", math.inf).rollout_ids)
    ledger.drop([f"000001-{at:06d}" for at in dead], "dead letter")
    ledger.train([f"000000-{at:06d}" for at in range(4)])
    after = restored(ledger)
    after.issue(1, paired(1), 2, least=least)
    assert compositions(after) == [[0, 1], [2, 3]]
    assert after.dropped == {"dead letter": len(dead)}
    ids = [f"000001-{at:06d}" for at in range(4)]
    after.commit(ids)
    after.train(ids)
    after.check()
    assert after.issued == 8 + len(dead), "those were issued twice, dropped once, trained once"
    with pytest.raises(LedgerError, match="issued twice"):
        after.issue(0, paired(0), 2)
    with pytest.raises(LedgerError, match="issued twice"):
        after.issue(1, paired(1), 2)


def test_what_went_wrong_stays_counted_when_the_learner_goes_back() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 2), 2)
    before = ledger.state()
    lease = ledger.lease("a", 1.0)
    ledger.give_back(lease.lease_id, "a")
    ledger.commit(ledger.lease("b", 1.0).rollout_ids)
    ledger.commit(lease.rollout_ids)
    ledger.resample(lease.rollout_ids, "lost")
    after = ledger.rewound(json.loads(json.dumps(before)))
    assert (after.reissued, after.refused, after.resampled) == (1, 2, {"lost": 2})


def test_failures_are_counted_by_rollout_whatever_becomes_of_the_lease() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 4), 4)
    whole = ledger.lease("a", 1.0)
    assert (ledger.failures(whole), ledger.failed(whole)) == (0, 1)
    ledger.give_back(whole.lease_id, "a")
    ledger.commit(whole.rollout_ids[:2])  # parted
    part = ledger.lease("b", 1.0)
    assert part.rollout_ids == whole.rollout_ids[2:]
    assert ledger.failed(part) == 2

    # The learner goes back to the start: what is under way is adopted, of other leases by now.
    after = ledger.rewound(None)
    after.issue(0, requests(0, 4), 2)
    after.adopt(part, "b", 1.0)
    assert after.failures(part) == 2
    after.give_back(part.lease_id, "b")
    assert after.failed(after.lease("c", 1.0)) == 3, "given back, it is the next one"
    after.done(part)
    assert after.failures(part) == 0
    assert after.failed(part) == 1
    after.commit(part.rollout_ids)
    after.train(part.rollout_ids)
    assert after.failures(part) == 0, "nothing is kept of what is settled"


def test_what_cannot_be_is_refused() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 2), 2)
    with pytest.raises(LedgerError, match="issued twice"):
        ledger.issue(0, requests(0, 1), 1)
    lease = ledger.lease("a", 1.0)
    with pytest.raises(LedgerError, match="never issued"):
        ledger.commit(["000009-000000"])
    with pytest.raises(LedgerError, match="other rollouts"):
        ledger.commit(lease.rollout_ids[:1])
    with pytest.raises(LedgerError, match="without a commit"):
        ledger.train(lease.rollout_ids)
    with pytest.raises(LedgerError, match="in part only"):
        ledger.drop(lease.rollout_ids[:1], "test")
    ledger.commit(lease.rollout_ids)
    ledger.train(lease.rollout_ids)
    with pytest.raises(LedgerError, match="issued twice"):
        ledger.issue(0, requests(0, 1), 1)
    ledger.trained += 1
    with pytest.raises(LedgerError, match="accounted for"):
        ledger.check()
