"""The ledger: every rollout in exactly one state, whatever happens in whatever order."""

from __future__ import annotations

import json

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.trajectory import RolloutRequest
from deploy.ledger import Lease, Ledger, LedgerError


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


def ids(lease: Lease) -> list[str]:
    return [request.rollout_id for request in lease.requests]


class Books(RuleBasedStateMachine):
    """Random operations against plain sets that are kept beside the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.iteration = 0
        self.held: dict[int, Lease] = {}
        self.gone: list[Lease] = []
        self.committed: set[str] = set()
        self.every: set[str] = set()
        self.trained: set[str] = set()
        self.dropped: set[str] = set()
        self.refused = 0

    @rule(count=st.integers(1, 7), size=st.integers(1, 4))
    def issue(self, count: int, size: int) -> None:
        made = requests(self.iteration, count)
        self.ledger.issue(self.iteration, made, size)
        self.every |= {request.rollout_id for request in made}
        self.iteration += 1

    @precondition(lambda self: self.ledger.queued)
    @rule()
    def lease(self) -> None:
        lease = self.ledger.lease()
        self.held[lease.lease_id] = lease

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.held)))
        self.gone.append(self.held.pop(lease_id))
        self.ledger.give_back(lease_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        assert self.ledger.commit(lease.lease_id, ids(lease))
        self.committed |= set(ids(lease))
        self.gone.append(lease)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def late_commit(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.gone))
        if lease.lease_id in self.held:
            return  # leased again meanwhile: that is the first commit, not a late one
        assert not self.ledger.commit(lease.lease_id, ids(lease))
        self.refused += len(lease.requests)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), drop=st.booleans())
    def consume(self, data: st.DataObject, drop: bool) -> None:
        some = data.draw(st.sets(st.sampled_from(sorted(self.committed)), min_size=1))
        if drop:
            self.ledger.drop(some, "test")
            self.dropped |= some
        else:
            self.ledger.train(some)
            self.trained |= some
        self.committed -= some

    @invariant()
    def books_balance(self) -> None:
        self.ledger.check()
        assert self.ledger.issued == len(self.every)
        assert self.ledger.trained == len(self.trained)
        assert sum(self.ledger.dropped.values()) == len(self.dropped)
        assert self.ledger.refused == self.refused
        assert self.ledger.in_flight == len(self.every - self.trained - self.dropped)
        assert not self.trained & self.dropped

    @invariant()
    def a_restored_ledger_counts_what_is_settled(self) -> None:
        restored = Ledger.restore(json.loads(json.dumps(self.ledger.state())))
        restored.check()
        assert restored.trained == self.ledger.trained
        assert restored.in_flight == 0


TestBooks = Books.TestCase


def test_a_lease_given_back_is_the_next_one() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 6), 2)
    first = ledger.lease()
    ledger.give_back(first.lease_id)
    assert ledger.lease() == first
    assert ledger.reissued == 1


def test_what_cannot_be_is_refused() -> None:
    ledger = Ledger()
    ledger.issue(0, requests(0, 2), 2)
    with pytest.raises(LedgerError, match="issued twice"):
        Ledger.issue(ledger, 0, requests(0, 1), 1)
    lease = ledger.lease()
    with pytest.raises(LedgerError, match="other rollouts"):
        ledger.commit(lease.lease_id, ["nobody"])
    with pytest.raises(LedgerError, match="without a commit"):
        ledger.train(["nobody"])
    with pytest.raises(LedgerError, match="without a commit"):
        ledger.drop(["nobody"], "test")
    ledger.trained += 1
    with pytest.raises(LedgerError, match="accounted for"):
        ledger.check()
