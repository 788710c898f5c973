"""Work that no worker can do: a lease, or a scoring call, that costs every worker that gets it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import ray

from common.errors import WorkerError
from common.wire.trajectory import RolloutRequest, to_table
from deploy.control.jobs import Sampled, first_share
from deploy.control.leases import Lease
from tests.deploy.control.simulated import LEASE, Rig, SleepingActor, SleepingScorer, lost_object

BAD = "000000-000004"
"""A rollout of the second lease."""
OF_LEASE_1 = r"lease 1 \(rollouts 000000-000004 to 000000-000007\) cost 3 workers in a row"


def strike(table: pa.Table, how: str) -> None:
    if BAD in table["rollout_id"].to_pylist():
        if how == "dies":
            time.sleep(0.3)  # the answer to the call before is on its way
            os._exit(1)
        time.sleep(60)


class Hangs(SleepingActor):
    def generate(self, requests: pa.Table, manifest: Any, *payloads: Any) -> Any:
        strike(requests, "hangs")
        return super().generate(requests, manifest)


class Sleeps(SleepingActor):
    def generate(self, requests: pa.Table, manifest: Any, *payloads: Any) -> Any:
        time.sleep(60)


class Dies(SleepingActor):
    def generate(self, requests: pa.Table, manifest: Any, *payloads: Any) -> Any:
        strike(requests, "dies")
        return super().generate(requests, manifest)


class DiesTwice(SleepingActor):
    """The first two workers have a fault that their successors do not have."""

    def generate(self, requests: pa.Table, manifest: Any, *payloads: Any) -> Any:
        if self.actor_id in ("rollout-0", "rollout-1"):
            strike(requests, "dies")
        return super().generate(requests, manifest)


class HangsAtScoring(SleepingScorer):
    def score(self, *tables: pa.Table) -> Any:
        strike(pa.concat_tables(tables), "hangs")
        return super().score(*tables)


class DiesAtScoring(SleepingScorer):
    def score(self, *tables: pa.Table) -> Any:
        strike(pa.concat_tables(tables), "dies")
        return super().score(*tables)


@pytest.mark.parametrize(
    ("max_failures", "says"),
    [
        pytest.param(
            1, r"^lease 0 \(rollouts .*\) cost 3 workers in a row", marks=pytest.mark.chaos
        ),
        (0, r"^2 rollout workers failed .*hung: no answer .*, at work on lease 0 \(rollouts "),
    ],
)
def test_a_deadline_that_is_too_short_for_every_lease_is_told_with_a_lease(
    rig: Callable[..., Rig], max_failures: int, says: str
) -> None:
    """Also where the limit of the pool is reached, which the third failure is one too many for."""
    here = rig(1, actor=Sleeps, deadline_s=1.0, max_failures=max_failures)
    here.issue(0, 20 * LEASE)
    with pytest.raises(WorkerError, match=says) as raised:
        here.pump_until(lambda: False)
    assert "within 1 s (rollout.lease_deadline_s)" in str(raised.value)


@pytest.mark.parametrize(
    ("actor", "deadline_s", "cause", "says"),
    [
        pytest.param(
            *(Hangs, 3.0, "hung", r"no answer within 3 s \(rollout\.lease_deadline_s\)"),
            marks=pytest.mark.chaos,
        ),
        (Dies, 60.0, "died", r"died: .*rollout\.lease_deadline_s"),
    ],
)
def test_the_third_worker_that_a_lease_costs_ends_the_run(
    rig: Callable[..., Rig], actor: type, deadline_s: float, cause: str, says: str
) -> None:
    """And never a lease that waited behind it."""
    here = rig(3, actor=actor, deadline_s=deadline_s)
    here.issue(0, 8 * LEASE)
    blamed: set[str] = set()
    with pytest.raises(WorkerError, match=f"{OF_LEASE_1}.*{says}"):
        while True:
            here.collector.pump(0.02)
            blamed |= set(here.ledger._failures)
    assert blamed == {f"000000-{i:06d}" for i in range(4, 8)}
    assert here.pool.losses == {cause: 3}
    assert here.ledger.count("committed") <= 7 * LEASE


@pytest.mark.chaos
def test_a_lease_that_succeeds_at_the_third_worker_is_forgiven(rig: Callable[..., Rig]) -> None:
    here = rig(2, actor=DiesTwice)
    here.pump_until(lambda: len(here.working()) == 2)  # both, before a successor is there
    here.issue(0, 4 * LEASE)
    here.everything_once(4 * LEASE)
    assert here.pool.losses == {"died": 2}
    assert not here.ledger._failures


@pytest.mark.chaos
def test_a_node_that_is_taken_away_is_not_the_fault_of_its_lease(rig: Callable[..., Rig]) -> None:
    here = rig(4, seconds_per_token=0.1)
    here.pump_until(lambda: len(here.working()) == 4)
    here.issue(0, LEASE)
    for lost in range(1, 4):
        here.pump_until(lambda: any(w.busy for w in here.pool.workers.values()))
        (at_work,) = [w for w in here.pool.workers.values() if w.busy]
        at_work.leave_by = time.monotonic() + 60.0
        os.kill(at_work.pid, signal.SIGKILL)
        here.pump_until(lambda: here.pool.failures == lost)  # noqa: B023
    here.everything_once(LEASE)
    assert here.pool.losses == {"preempted": 3}


def test_weights_that_are_lost_are_asked_for_once_and_not_for_ever(rig: Callable[..., Rig]) -> None:
    here = rig(2)
    here.pump_until(lambda: len(here.working()) == 2)
    weights = here.collector.weights
    assert weights is not None
    here.collector.weights = replace(weights, payloads=(lost_object(),))
    here.issue(0, 8 * LEASE)
    here.pump_until(lambda: here.collector.lost_weights is here.collector.weights)
    here.pump_for(1.0)
    assert here.ledger.reissued <= 4, "each worker had two leases at most"
    here.publish(0)
    here.everything_once(8 * LEASE)
    assert here.pool.failures == 0
    assert not here.ledger._failures


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("scorer", "deadline_s", "says"),
    [
        (HangsAtScoring, 3.0, r"no answer within 3 s \(rollout\.lease_deadline_s\)"),
        (DiesAtScoring, 60.0, r"died: "),
    ],
)
def test_the_third_reward_worker_that_a_table_costs_ends_the_run(
    rig: Callable[..., Rig], scorer: type, deadline_s: float, says: str
) -> None:
    """Named alone, though it was first scored together with others, which are scored without it."""
    here = rig(1, scorers=3, scorer=scorer, deadline_s=deadline_s)
    here.pump_until(lambda: len(here.scorers.able(1)) == 3)
    queue(here, 0, 8)
    here.collector._dispatch()
    (first, *_) = here.collector._scoring.values()
    assert len(first.sampled) == 2, "lease 1 beside lease 0"
    with pytest.raises(WorkerError, match=f"{OF_LEASE_1}.*reward-.*{says}"):
        here.pump_until(lambda: False)
    assert here.ledger.count("committed") == 7 * LEASE
    assert here.ledger.reissued == 0, "what was sampled is not sampled again"


def queue(here: Rig, iteration: int, tables: int) -> None:
    """So many leases' tables wait to be scored, all at once."""
    here.issue(iteration, tables * LEASE)
    for _ in range(tables):
        lease = here.ledger.lease("", float("inf"))
        actor = SleepingActor("nobody", 0.0, "text")
        assert here.collector.weights is not None
        manifest = here.collector.weights.manifest
        facts, table = actor.generate(to_table(lease.requests, RolloutRequest), manifest)
        sampled = Sampled(lease, 0, facts.response_tokens + LEASE, ray.put(table))
        here.collector._sampled.append(sampled)


def test_what_waits_is_dealt_to_all_and_no_call_is_larger_than_its_deadline_allows(
    rig: Callable[..., Rig],
) -> None:
    """64 tables of 44 tokens, four workers: one call had them all."""
    here = rig(1, scorers=4)
    here.pump_until(lambda: len(here.scorers.able(1)) == 4)
    for iteration, (most, tables) in enumerate([(10**9, 16), (200, 4)]):
        here.collector._call_tokens = most
        queue(here, iteration, 64)
        here.collector._dispatch()
        calls = list(here.collector._scoring.values())
        assert [len(job.sampled) for job in calls] == [tables] * 4
        here.everything_once((iteration + 1) * 64 * LEASE)


class Slow(SleepingScorer):
    def score(self, *tables: pa.Table) -> Any:
        time.sleep(0.1)
        return super().score(*tables)


def test_who_scores_last_never_computes_beside_who_samples(rig: Callable[..., Rig]) -> None:
    made = rig(1, scorers=1, scorer=Slow, score_last=True, seconds_per_token=0.02)
    pools = made.pool, made.scorers
    made.pump_until(lambda: all(w.state == "working" for p in pools for w in p.workers.values()))
    made.issue(0, 4 * LEASE)
    beside = False

    def done() -> bool:
        nonlocal beside
        at_work = [any(w.busy for w in p.workers.values()) for p in pools]
        beside = beside or all(at_work)
        return made.ledger.count("committed") == 4 * LEASE

    made.pump_until(done)
    made.everything_once(4 * LEASE)
    assert not beside


@pytest.mark.parametrize(
    ("tokens", "workers", "most", "count"),
    [
        ([10] * 64, 4, 10**9, 16),
        ([10] * 64, 5, 10**9, 12),
        ([10] * 64, 1, 10**9, 64),
        ([10] * 64, 1, 100, 10),
        ([10, 10, 10], 2, 10**9, 1),
        ([500, 10, 10], 1, 100, 1),
        ([10, 500], 1, 100, 1),
        ([10], 4, 100, 1),
    ],
)
def test_an_even_share_within_the_bound_and_one_table_at_least(
    tokens: list[int], workers: int, most: int, count: int
) -> None:
    lease = Lease(lease_id=0, iteration=0, requests=())
    tables = [Sampled(lease, 0, n, None) for n in tokens]  # type: ignore[arg-type]
    assert first_share(tables, workers, most) == count
