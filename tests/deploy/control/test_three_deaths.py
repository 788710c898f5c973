"""A rollout actor, a reward worker and a rank are killed in one run, which is resumed later."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.run_folder.log_lines import Line, read_lines
from deploy.watch.runs import WatchedRun
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import Run, kill_worker, when
from tests.workspaces import run_copy

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("cluster")]


def kill_rank(gang: LearnerGang) -> None:
    pid = ray.get(gang.ranks[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def surviving(lines: list[Line]) -> list[Line]:
    """The history that is true at last: of an iteration that was trained again the later line."""
    steps = {line.step: line for line in lines if line.stage == "train"}
    return [steps[step] for step in sorted(steps)]


def test_every_death_is_told_once_by_its_cause(workspace: RunConfig, tmp_path: Path) -> None:
    train = {"iterations": 6, "checkpoint_every": 1, "ppg": None}
    config = run_copy(workspace, tmp_path, train=train)
    save_config(config, config.run_dir / "config.yaml")
    gang = LearnerGang(config, "deaths")
    with Run(config, gang, stop_after=5) as controller:
        threads = [
            when(lambda: controller.iteration >= 1, lambda: kill_worker(controller, "rollout")),
            when(lambda: controller.iteration >= 2, lambda: kill_worker(controller, "reward")),
            when(lambda: controller.iteration >= 3, lambda: kill_rank(gang)),
        ]
        facts = controller.run()
        for thread in threads:
            thread.join()
    assert (facts["worker_failures"], facts["learner_restarts"]) == (2, 1)
    with Run(config, gang) as controller:
        facts = controller.run()
    gang.stop()
    assert facts["finished"]
    assert (facts["worker_failures"], facts["learner_restarts"]) == (2, 1)

    lines = surviving(read_lines(config.folder.metrics).lines)
    assert [line.step for line in lines] == [1, 2, 3, 4, 5, 6]
    last = lines[-1].metrics
    expected = {"workers_lost/rollout/died": 1, "workers_lost/reward/died": 1}
    expected |= {"workers_lost/rollout": 1, "workers_lost/reward": 1, "learner_restarts": 1}
    assert {name: last[name] for name in expected} == expected
    for name in (*expected, "leases_reissued", "late_commits"):
        values = [line.metrics[name] for line in lines if name in line.metrics]
        assert values == sorted(values), f"{name} falls"

    told = WatchedRun(config.run_dir).workers()
    ends = [span["end"].partition(":")[0] for lane in told["lanes"] for span in lane["spans"]]
    assert ends.count("died") == 2
    for role in ("rollout", "reward"):
        lanes = [lane for lane in told["lanes"] if lane["name"].startswith(role)]
        (lost,) = [
            span for lane in lanes for span in lane["spans"] if span["end"].startswith("died")
        ]
        assert any(span["from"] > lost["to"] for lane in lanes for span in lane["spans"]), (
            "another took its place, and not at once"
        )
    said = [event["what"] for event in told["events"]]
    assert said.count("learner restarted") == 1
