"""A phase may outlast `learner.deadline_s`, as long as its micro-batches follow each other."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from common.config.run import RunConfig
from common.errors import WorkerError
from deploy.workers import pulses
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import Run, when
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
LONG: dict[str, Any] = {"iterations": 1, "e_pi": 140, "e_v": 140, "stop_kl": None, "ppg": None}
DEADLINE_S = 2.0


@pytest.fixture
def long(
    workspace: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RunConfig, LearnerGang]]:
    """A run whose phase is long, and ranks that tell all the time what they took up."""
    monkeypatch.setattr("deploy.workers.gang._PULSE_S", 0.2)
    learner = {"deadline_s": 60.0, "micro_batch_tokens": 48, "max_restarts": 0}
    config = run_copy(workspace, tmp_path, train=LONG, learner=learner)
    gang = LearnerGang(config, f"long-{tmp_path.name}")
    phase = gang.policy_phase

    def impatiently(*args: Any, **named: Any) -> dict[str, float]:
        gang.deadline_s = DEADLINE_S  # here alone: what comes before may start libraries
        try:
            return phase(*args, **named)
        finally:
            gang.deadline_s = config.learner.deadline_s

    gang.policy_phase = impatiently  # type: ignore[method-assign]
    yield config, gang
    gang.stop()


def test_a_phase_that_outlasts_the_deadline_is_no_hang(
    long: tuple[RunConfig, LearnerGang],
) -> None:
    config, gang = long
    with Run(config, gang) as controller:
        facts = controller.run()
    assert facts["learner_restarts"] == 0
    [line] = config.folder.metrics.read_text().splitlines()
    assert json.loads(line)["metrics"]["learn_seconds"] > 3 * DEADLINE_S
    keys = list(gang._pulses)
    assert all(told not in (None, b"0") for told in pulses.heard(keys))
    gang.stop()
    assert pulses.heard(keys) == (None,) * len(keys)


def test_a_rank_that_stands_still_in_it_is_one(
    long: tuple[RunConfig, LearnerGang], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gang = long
    pid = ray.get(gang.ranks[-1].__ray_call__.remote(lambda _: os.getpid()))
    begun: list[float] = []
    found: list[float] = []
    monkeypatch.setattr("tests.deploy.control.test_long_phases.DEADLINE_S", 2 * DEADLINE_S)
    phase = gang.policy_phase

    def timed(*args: Any, **named: Any) -> dict[str, float]:
        try:
            return phase(*args, **named)
        finally:
            found.append(time.monotonic())

    monkeypatch.setattr(gang, "policy_phase", timed)
    with Run(config, gang) as controller:

        def stand_still() -> None:
            time.sleep(0.5)
            os.kill(pid, signal.SIGSTOP)
            begun.append(time.monotonic())

        thread = when(lambda: bool(controller.position.batch), stand_still)
        with pytest.raises(WorkerError, match="policy_phase"):
            controller.run()
        thread.join()
    assert found[0] - begun[0] < 1.5 * DEADLINE_S
