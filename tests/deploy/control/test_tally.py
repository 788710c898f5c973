"""Counts of a run go on over deaths of workers, restarts of the learner, and resumes."""

from __future__ import annotations

import json

import pytest

from deploy.control.ledger import Ledger
from deploy.control.tally import Tally
from deploy.workers import pool
from deploy.workers.pool import Pool
from deploy.workers.worker import Worker


def lose(some: Pool, name: str) -> None:
    some.workers[name] = Worker(name=name, handle=None, asked=0.0, command=None)
    some.lost(name, "died", "a test")


def test_a_resumed_run_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "kill", lambda handle: None)
    first, second = (Pool(kind="rollout", make=str, max_failures=9) for _ in range(2))
    tally = Tally([first])
    tally.carry_on({})
    lose(first, "a")
    tally.add({"http/judge/retries": 2, "http/judge/dead_letters": 0})
    tally.add({"http/judge/retries": 1})  # by another worker
    saved = json.loads(json.dumps(tally.counted()))
    assert saved["http/judge/retries"] == 3
    assert saved["http/judge/dead_letters"] == 0

    # Another process: one worker dies before the checkpoint is read, one after.
    resumed = Tally([second])
    lose(second, "b")
    resumed.carry_on(saved)
    lose(second, "c")
    resumed.add({"http/judge/retries": 4, "weights_reloaded": 1})
    now = resumed.metrics(Ledger())
    assert now["workers_lost/rollout"] == now["workers_lost/rollout/died"] == 3
    assert (now["http/judge/retries"], now["weights_reloaded"]) == (7, 1)
    assert resumed.failures == 3
    assert now["workers/rollout"] == 0, "how many there are is no count"

    resumed.carry_on(saved)  # the learner goes back to the checkpoint: nothing is undone
    assert resumed.metrics(Ledger()) == now
