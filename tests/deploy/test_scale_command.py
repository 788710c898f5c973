"""`talipot scale` and `talipot status` against a run at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.control.status import Status
from deploy.stages.controller_actor import RemoteController, start_controller
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from tests.conftest import run_copy
from tests.deploy.commands import Run
from tests.deploy.control.runs import prompts_of
from tests.deploy.test_cli import refused

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def at_work(
    workspace: RunConfig, tmp_path_factory: pytest.TempPathFactory, cluster: None
) -> Iterator[tuple[RunConfig, RemoteController]]:
    """A run with workers of its own that goes on until it is stopped."""
    endless = {"iterations": 10_000, "checkpoint_every": 0, "ppg": None}
    config = run_copy(workspace, tmp_path_factory.mktemp("work"), train=endless)
    save_config(config, config.run_dir / "config.yaml")
    folder = config.run_dir
    tokenizer, sft = folder / "tokenizer.json", folder / "sft" / "policy.safetensors"
    reward = folder / "reward_model" / "reward.safetensors"
    controller = start_controller(
        config,
        prompts_of(config),
        LearnerGang(config, "scale-tests", start=False),
        (
            rollout_pool(config, "scale-tests", tokenizer, sft, start=False),
            reward_pool(config, "scale-tests", tokenizer, sft, reward, start=False),
        ),
        None,
        detached=False,
    )
    yield config, controller
    controller.stop()
    deadline = time.monotonic() + 120
    while ray.get(controller.start_outcome(1.0)) is None:
        assert time.monotonic() < deadline
    controller.end()


def until(controller: RemoteController, condition: Callable[[Status], bool]) -> Status:
    """Ask for the status until a condition holds."""
    deadline = time.monotonic() + 120
    while True:
        status = controller.status()
        if condition(status):
            return status
        assert ray.get(controller.start_outcome(0.2)) is None, "it ended"
        assert time.monotonic() < deadline, status


def test_a_run_is_scaled_while_it_works(
    run: Run, at_work: tuple[RunConfig, RemoteController]
) -> None:
    config, controller = at_work
    folder = str(config.run_dir)
    until(controller, lambda status: status.iteration >= 1)

    begin = time.monotonic()
    up = run("scale", folder, "--actors", "3", "--reward-replicas", "2")
    assert time.monotonic() - begin < 20
    assert up.code == 0, up.error
    assert up.out.splitlines() == ["rollout workers: 2 -> 3", "reward workers: 1 -> 2"]
    status = until(controller, lambda status: "scale_seconds/rollout" in status.counts)
    assert status.counts["workers/rollout"] == 3
    assert 0 < status.counts["scale_seconds/rollout"] < 120

    shown = " ".join(run("status", folder).out.split())
    for said in (
        "running True",
        "rollout-2 working",
        "reward-1",
        "scale_seconds/rollout",
        "process",
    ):
        assert said in shown, shown

    down = run("scale", folder, "--actors", "1")
    assert down.out.splitlines() == ["rollout workers: 3 -> 1"]
    status = until(controller, lambda status: status.rollout_workers == 1)
    assert status.counts["workers_drained/rollout"] == 2
    assert status.counts["workers_lost/rollout"] == 0
    now = status.iteration
    until(controller, lambda status: status.iteration > now + 1)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], 2, "--actors"),
        (["--actors", "0"], 2, "--actors"),
        (["--actors", "1000"], 5, "1000 rollout actors"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Run, at_work: tuple[RunConfig, RemoteController], options: list[str], code: int, says: str
) -> None:
    refused(run("scale", str(at_work[0].run_dir), *options), code, says)


def test_a_run_that_does_not_run_is_one_line(
    run: Run, workspace: RunConfig, tmp_path: Path
) -> None:
    idle = run_copy(workspace, tmp_path)
    folder = idle.run_dir.rename(tmp_path / "idle")
    save_config(idle, folder / "config.yaml")
    refused(run("scale", str(folder), "--actors", "2"), 5, "is not running here", "--resume")
    refused(run("scale", str(tmp_path), "--actors", "2"), 3, "not a run")
