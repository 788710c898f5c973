"""Elastic workers that die while a run goes on: nothing is lost, doubled or miscounted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from common.config.run import RunConfig
from common.errors import WorkerError
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import Run, finish, kill_worker, when
from tests.reward_service.endpoint import DOWN, Endpoint, Reply, Rows, scores
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize("kind", ["rollout", "reward"])
def test_sigkill_of_a_worker_loses_and_doubles_nothing(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    kind: str,
) -> None:
    config = run_copy(workspace, tmp_path)
    with Run(config, gang) as controller:
        thread = when(lambda: controller.iteration >= 1, lambda: kill_worker(controller, kind))
        facts = controller.run()
        thread.join()
    assert facts["worker_failures"] == 1
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 64
    assert facts["weights_hash"] == reference[1]["weights_hash"]


def test_scaling_live_with_a_sigkill_changes_no_result(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Invariant I5: 2 -> 4 -> 1 actors while the run goes on, and one of them killed."""
    config = run_copy(workspace, tmp_path)
    with Run(config, gang) as controller:
        # Each in an iteration of its own: the loop works on while these act.
        threads = [
            when(lambda: controller.iteration >= 1, lambda: controller.scale(4, None)),
            when(lambda: controller.iteration >= 2, lambda: kill_worker(controller, "rollout")),
            when(lambda: controller.iteration >= 3, lambda: controller.scale(1, None)),
        ]
        facts = controller.run()
        for thread in threads:
            thread.join()
        controller.collector.rollout.tend()
        assert controller.collector.rollout.target == 1
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 64
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    said = [json.loads(x) for x in (config.run_dir / "events.jsonl").read_text().splitlines()]
    assert [x["detail"] for x in said if x["what"] == "scaled"] == ["from 2 to 4", "from 4 to 1"]
    assert [x["what"] for x in said].count("died") == 1


def test_a_worker_that_keeps_dying_ends_the_run_with_its_cause(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        # The third death: the pool counts it before the lease that it cost does.
        controller.collector.rollout.max_failures = 0
        controller.collector.rollout.make = lambda name: _Broken.options(num_cpus=0.1).remote()
        controller.collector.rollout.stop()
        controller.collector.rollout.scale(2)
        with pytest.raises(WorkerError, match=r"3 rollout workers failed within.*rollout-\d"):
            controller.run()


@ray.remote
class _Broken:
    """A worker whose process ends at every call."""

    def generate(self, *_: object) -> None:
        os._exit(1)


def test_no_count_falls_on_a_resume(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Of workers lost, and of what a flaky endpoint cost."""

    def behave(number: int, rows: Rows) -> Reply:
        return DOWN if number % 5 == 4 else scores([(row["rollout_id"], 1.0) for row in rows])

    with Endpoint(behave) as endpoint:
        remote = {"kind": "http", "target": endpoint.url, "batch_size": 4}
        config = run_copy(workspace, tmp_path, reward_service={"components": {"remote": remote}})
        with Run(config, gang, stop_after=3) as controller:
            thread = when(
                lambda: controller.iteration >= 1, lambda: kill_worker(controller, "rollout")
            )
            assert controller.run()["worker_failures"] == 1
            thread.join()
        assert finish(config, gang)["worker_failures"] == 1
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["metrics"] for line in lines]
    for name in ("workers_lost/rollout", "http/remote/requests", "http/remote/failures"):
        values = [metrics[name] for metrics in logged]
        assert values == sorted(values), name
    last = logged[-1]
    assert last["workers_lost/rollout"] == last["workers_lost/rollout/died"] == 1
    assert last["http/remote/requests"] == len(endpoint.calls)
    assert last["http/remote/failures"] == last["http/remote/retries"] == len(endpoint.calls) // 5
    assert last["http/remote/dead_letters"] == last["http/remote/circuit_opened"] == 0
