"""Liveness is told by the monotonic clock: a step of the wall clock kills and saves nobody."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from common.errors import WorkerError
from deploy.workers import placement, pool
from deploy.workers.pool import Pool
from deploy.workers.worker import Worker
from tests.deploy.control.simulated import Rig

HOUR = 3600.0


class Clock:
    """What `time` is to a module, at a time that the test sets."""

    def __init__(self, monotonic: float) -> None:
        self.now = monotonic

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


@pytest.fixture
def idle(cluster: None) -> Iterator[Rig]:
    here = Rig(1, beat_s=0.0, silence_s=3.0)
    here.pump_until(lambda: bool(here.working()))
    yield here
    here.pool.stop()


def step(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the wall clock, as a time server does."""
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + seconds)


def test_a_clock_set_forward_marks_no_idle_worker_as_hung(
    idle: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (worker,) = idle.pool.workers.values()
    worker.handle.__ray_call__.remote(lambda _: time.sleep(1.0))  # the next answer takes a moment
    idle.pump_for(0.3)
    step(monkeypatch, HOUR)
    idle.pump_for(0.3)
    assert idle.pool.failures == 0
    idle.issue(0, 8)
    idle.everything_once(8)
    assert idle.working() == [worker.name]


def test_a_clock_set_back_hides_no_hung_worker(idle: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = idle.pool.workers.values()
    os.kill(worker.pid, signal.SIGSTOP)
    idle.pump_for(0.3)
    step(monkeypatch, -HOUR)
    idle.pump_until(lambda: idle.pool.losses == {"hung": 1}, within_s=20.0)


def test_when_a_node_goes_is_told_in_the_clock_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(100.0)
    at = int(1000 * (clock.time() + 30.0))
    draining = SimpleNamespace(get_draining_nodes=lambda: {"soon": at, "one day": 0})
    monkeypatch.setattr(placement, "state", draining)
    monkeypatch.setattr(placement, "time", clock)
    leaving = placement.leaving_nodes()
    assert leaving["soon"] == pytest.approx(130.0, abs=0.01)
    assert leaving["one day"] > 100.0 + 12 * HOUR


def test_a_pool_that_is_handed_to_another_machine_keeps_its_deadlines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clocks of two machines have nothing in common: this one has been up for a minute only."""
    clock = Clock(9_000_000.0)
    monkeypatch.setattr(pool, "time", clock)
    made = Pool(kind="rollout", make=str, max_failures=0)
    made.workers["rollout-0"] = Worker(
        name="rollout-0", handle=None, asked=clock.now, command=None, probe_until=clock.now + 120.0
    )
    made._losses.recent.append(clock.now - 5.0)
    sent = cloudpickle.dumps(made)
    clock.now = 60.0
    (worker,) = pickle.loads(sent).workers.values()
    assert (worker.asked, worker.probe_until, worker.command) == (60.0, 180.0, None)
    assert list(pickle.loads(sent)._losses.recent) == [55.0]


def test_failures_that_come_slowly_end_the_run_unless_something_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that never starts is found every two minutes: five in any window, for ever."""
    clock = Clock(0.0)
    monkeypatch.setattr(pool, "time", clock)
    monkeypatch.setattr(pool, "kill", lambda handle: None)
    made = Pool(kind="rollout", make=str, max_failures=10, window_s=600.0)
    made.scale(1)

    def fail(times: int, *, works: bool) -> None:
        for _ in range(times):
            made._settle_size(clock.now + HOUR)
            (name,) = made.workers
            if works:
                made.succeeded(name)
            clock.now += 120.0
            made.lost(name, "hung", "has not started within 120 s")

    monkeypatch.setattr(Pool, "_ask", lambda self, worker, until: None)
    fail(100, works=True)
    fail(9, works=False)  # with the two around the last success: eleven, which one worker may have
    with pytest.raises(WorkerError, match=r"cluster\.max_restarts.*has not started within 120 s"):
        fail(1, works=False)
