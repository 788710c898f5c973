"""Workers that come, go, hang and die while work is handed out; their time is a sleep."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from common.errors import ClusterError, TrainingError, WorkerError
from common.wire.trajectory import Rollout, from_table
from deploy.control.batches import Stale
from deploy.control.jobs import Scored
from deploy.workers.placement import why_unplaced
from deploy.workers.worker import ClusterQueries
from tests.deploy.control.simulated import LEASE, Rig, is_running

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.chaos
def test_scaling_live_loses_nothing_and_throughput_follows(
    rig: Callable[..., Rig], capsys: pytest.CaptureFixture[str]
) -> None:
    """From 1 to 4 actors and back, on the real ledger, collector and pool."""
    here = rig(1)
    here.issue(0, 2000)
    here.pump_until(lambda: here.ledger.count("committed") > 0)
    alone = here.pump_for(1.0)

    assert here.pool.scale(4) == 1
    here.pump_until(lambda: len(here.by) == 4)
    latency = here.pool.scale_seconds
    four = here.pump_for(1.0)

    assert here.pool.scale(1) == 4
    here.pump_until(lambda: len(here.pool.workers) == 1)
    assert here.pool.left == 3
    again = here.pump_for(1.0)

    here.ledger.check()
    leased = here.ledger.count("leased")
    assert here.ledger.in_flight == 2000
    assert leased <= 2 * 4, "the three that left hold nothing"
    ids = [i for scored in here.collector.batches.waiting for i in scored.rollout_ids]
    assert len(ids) == len(set(ids)) == here.ledger.count("committed")
    assert here.pool.failures == here.ledger.refused == 0
    with capsys.disabled():
        print(
            f"\n1 -> 4 -> 1 actors: {alone:.0f} -> {four:.0f} -> {again:.0f} rollouts/s "
            f"({four / alone:.2f} times), first rollout {latency:.2f} s after the command"
        )
    assert four / alone > 2.0
    assert four / again > 1.7
    assert 0 < latency < 60


@pytest.mark.chaos
def test_a_draining_worker_hands_back_what_waits(rig: Callable[..., Rig]) -> None:
    here = rig(2, seconds_per_token=0.05)
    here.issue(0, 32)
    here.pump_until(lambda: here.ledger.count("leased") == 4 * 4)
    here.pool.scale(1)
    here.pump_until(lambda: len(here.working()) == 1)
    leaving = [w for w in here.pool.workers.values() if w.state == "draining"]
    assert all(worker.busy <= 1 for worker in leaving), "what waits goes to others at once"
    here.pump_until(lambda: len(here.pool.workers) == 1)
    assert here.ledger.reissued <= 1, "and what is in work is finished"
    assert here.pool.failures == 0
    here.everything_once(32)


@pytest.mark.chaos
def test_a_worker_on_its_way_out_is_taken_back(rig: Callable[..., Rig]) -> None:
    here = rig(2, seconds_per_token=0.05)
    here.issue(0, 32)
    here.pump_until(lambda: len(here.working()) == 2 and here.ledger.count("leased") == 16)
    names = set(here.pool.workers)
    here.pool.scale(1)
    here.pump_until(lambda: len(here.working()) == 1)
    here.pool.scale(2)
    here.pump_until(lambda: len(here.working()) == 2)
    assert set(here.pool.workers) == names
    here.everything_once(32)


@pytest.mark.chaos
def test_a_stopped_process_is_found_by_its_deadline_and_really_ended(
    rig: Callable[..., Rig],
) -> None:
    here = rig(2, seconds_per_token=0.02, deadline_s=3.0)
    here.issue(0, 80)
    here.pump_until(lambda: len(here.working()) == 2 and here.ledger.count("leased") == 16)
    hung = next(iter(here.pool.workers.values()))
    os.kill(hung.pid, signal.SIGSTOP)
    here.everything_once(80)
    assert here.pool.losses == {"hung": 1}
    (event,) = here.said("hung")
    assert event.worker == hung.name
    assert "no answer within 3 s" in event.detail
    here.pump_until(lambda: not is_running(hung.pid))
    assert here.ledger.reissued >= 1


def test_a_slow_worker_is_left_in_peace(rig: Callable[..., Rig]) -> None:
    here = rig(1, seconds_per_token=0.15, deadline_s=20.0, beat_s=0.1, silence_s=20.0)
    here.issue(0, 8)
    here.everything_once(8)
    assert here.pool.failures == 0
    assert here.ledger.reissued == 0


@pytest.mark.chaos
def test_the_death_and_the_hang_of_idle_workers_are_noticed(rig: Callable[..., Rig]) -> None:
    here = rig(2, beat_s=0.2, silence_s=1.0)
    here.pump_until(lambda: len(here.working()) == 2)
    dead, hung = here.pool.workers.values()
    os.kill(dead.pid, signal.SIGKILL)
    os.kill(hung.pid, signal.SIGSTOP)
    here.pump_until(lambda: here.pool.failures == 2 and len(here.working()) == 2)
    assert here.pool.losses == {"died": 1, "hung": 1}
    here.issue(0, 8)
    here.everything_once(8)


def test_one_that_waits_for_room_holds_nothing_up_and_is_reported(
    rig: Callable[..., Rig],
) -> None:
    def options(name: str) -> dict[str, Any]:
        return {"num_cpus": 10_000} if name == "rollout-1" else {}

    queries = ClusterQueries(why_unplaced=lambda handle: why_unplaced(handle, "room"))
    here = rig(2, options=options, cluster=queries)
    here.issue(0, 16)
    here.everything_once(16)
    here.pool.workers["rollout-1"].probe_until = 0.0  # its time is over
    here.pump_until(lambda: bool(here.said("waiting")))
    assert here.said("waiting")[0].worker == "rollout-1"
    assert "no node has room for room" in here.said("waiting")[0].detail
    assert here.pool.failures == 0

    none = rig(2, options=lambda name: {"num_cpus": 10_000}, cluster=queries)
    none.pump_until(lambda: len(none.pool.workers) == 2)
    for worker in none.pool.workers.values():
        worker.probe_until = 0.0
    with pytest.raises(ClusterError, match=r"rollout-1 has not started.*no node has room"):
        none.pool.tend()


def test_one_whose_start_fails_is_replaced_with_its_reason(
    rig: Callable[..., Rig],
) -> None:
    here = rig(0)
    make, made = here.pool.make, []

    def first_bad(name: str) -> Any:
        made.append(name)
        return _Unstartable.options(num_cpus=0.1).remote() if len(made) == 1 else make(name)

    here.pool.make = first_bad
    here.pool.scale(1)
    here.issue(0, 4)
    here.everything_once(4)
    assert here.pool.losses == {"unstarted": 1}
    assert "no such file: weights" in here.said("unstarted")[0].detail


@ray.remote
class _Unstartable:
    def __init__(self) -> None:
        raise FileNotFoundError("no such file: weights")


@pytest.mark.chaos
def test_failures_end_the_run_by_their_number_in_a_window(rig: Callable[..., Rig]) -> None:
    here = rig(1, max_failures=1, window_s=0.0)
    for iteration in range(3):  # the first two are long past, as far as the window goes
        here.issue(iteration, 4)
        here.pump_until(lambda: not here.ledger.queued and not here.ledger.count("leased"))
        if iteration < 2:
            here.pool.lost(here.working()[0], "died", "a test")
    here.pool.window_s = 600.0
    here.pump_until(lambda: bool(here.working()))
    here.pool.lost(here.working()[0], "died", "a test")
    here.pump_until(lambda: bool(here.working()))
    with pytest.raises(WorkerError, match=r"3 rollout workers failed within 600 s.*a test"):
        here.pool.lost(here.working()[0], "died", "a test")


@pytest.mark.chaos
def test_losses_at_one_time_are_one_wait_and_later_ones_wait_longer(
    rig: Callable[..., Rig],
) -> None:
    here = rig(3)
    here.pump_until(lambda: len(here.working()) == 3)
    for name in here.working():
        here.pool.lost(name, "died", "its node")
    first = here.pool._losses.replace_at - time.monotonic()
    assert first <= 0.1
    here.pump_until(lambda: len(here.working()) == 3)
    here.pool.lost(here.working()[0], "died", "again")
    assert first < here.pool._losses.replace_at - time.monotonic() <= 0.2


def test_books_that_are_rewound_keep_what_fits_and_void_the_rest(rig: Callable[..., Rig]) -> None:
    here = rig(1, seconds_per_token=0.05)
    books = here.ledger
    here.issue(0, 16)
    here.pump_until(lambda: books.count("committed") >= 4 and books.count("leased") == 8)
    kept = books.count("committed")
    here.publish(1)
    here.issue(1, 8)
    here.pump_until(lambda: any(s.policy_version == 1 for s in here.collector.batches.waiting))

    # The learner is back at version 0: what version 1 sampled, or samples, never was.
    fresh = books.rewound(None)
    for iteration in (0, 1):
        fresh.issue(iteration, here.prompts.requests(iteration, 16 - 8 * iteration, 1), 4)
    here.publish(0)
    here.collector.rewind(fresh, 0, 1)
    here.ledger = fresh
    assert fresh.count("committed") >= kept
    here.everything_once(24)
    assert {s.policy_version for s in here.collector.batches.waiting} == {0}


def test_a_hung_worker_is_found_though_its_work_is_void(rig: Callable[..., Rig]) -> None:
    here = rig(1, seconds_per_token=0.05, deadline_s=2.0)
    here.issue(0, 8)
    here.pump_until(lambda: here.ledger.count("leased") == 8)
    (hung,) = here.pool.workers.values()
    os.kill(hung.pid, signal.SIGSTOP)
    fresh = here.ledger.rewound(None)
    here.collector.rewind(fresh, -1, 0)
    here.pump_until(lambda: here.pool.failures == 1)
    assert here.pool.losses == {"hung": 1}


@pytest.mark.parametrize("stale", ["wait", "drop"])
def test_what_is_too_old_is_never_trained(rig: Callable[..., Rig], stale: Stale) -> None:
    """Invariant I7, at consumption: the first of an iteration were sampled from version 0."""
    here = rig(1)
    here.issue(5, 32)
    here.pump_until(lambda: here.ledger.count("committed") >= 8)
    here.publish(5)
    here.pump_until(lambda: here.ledger.count("committed") == 32)
    assert here.collector.batches.waiting[0].policy_version == 0

    def take() -> Any:
        return here.collector.take(5, oldest=4, stale=stale)

    batch = take()
    while batch is None:
        here.collector.pump(0.02)
        batch = take()
    rows = [row for s in batch for row in from_table(ray.get(s.table), Rollout)]
    assert {row.policy_version for row in rows} == {5}
    if stale == "drop":
        assert here.ledger.dropped["stale"] == 32 - len(rows) > 0
        assert here.collector.counts()["dropped/stale"] == 32 - len(rows)
    else:
        assert len(rows) == 32
        assert here.ledger.resampled["stale"] >= 8
    here.ledger.train(row.rollout_id for row in rows)
    here.ledger.check()
    assert here.ledger.in_flight == 0


def test_what_staleness_leaves_alone_is_dropped_too(rig: Callable[..., Rig]) -> None:
    """Prompts' responses in leases of their own: some are of one old and one new version."""
    here = rig(1)
    here.ledger.issue(5, here.prompts.requests(5, 8, 2), 1)
    here.pump_until(lambda: here.ledger.count("committed") >= 3)
    here.publish(5)
    batch: list[Scored] | None = None
    while batch is None:
        here.collector.pump(0.02)
        batch = here.collector.take(5, oldest=4, stale="drop", least=2)
    trained = [i for s in batch for i in s.trained]
    assert {s.policy_version for s in batch} == {5}
    dropped = here.ledger.dropped
    assert dropped["stale"] >= 3
    assert dropped["lone"] == dropped["stale"] % 2
    assert trained == [f"000005-{i:06d}" for i in range(16 - len(trained), 16)]
    here.ledger.train(trained)
    here.ledger.check()
    assert here.ledger.in_flight == 0


def test_calls_of_a_history_rolled_back_twice_are_thrown_away(rig: Callable[..., Rig]) -> None:
    """Their version fits the second history again, which it never was part of."""
    here = rig(2, seconds_per_token=0.1)
    here.pump_until(lambda: len(here.working()) == 2)
    requests = here.prompts.requests(3, 16, 1)
    here.publish(3)
    here.ledger.issue(3, requests, LEASE)
    here.pump_until(lambda: here.ledger.count("leased") == 16)
    for version in (2, 4):
        here.ledger = here.ledger.rewound(None)
        here.ledger.issue(3, requests, LEASE)
        here.collector.rewind(here.ledger, version, 1)
        assert here.ledger.count("queued") == 16
    here.everything_once(16)
    assert here.pool.failures == 0


def test_actors_that_never_get_new_weights_are_an_error_and_no_endless_loop(
    rig: Callable[..., Rig],
) -> None:
    here = rig(1)
    here.issue(3, 4)
    here.pump_until(lambda: here.ledger.pending(3) == 0)
    with pytest.raises(TrainingError, match="actors hold version 0, and 2 is the oldest"):
        here.collector.take(3, oldest=2, stale="wait")
