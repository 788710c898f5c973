"""`talipot scale` and `talipot status` against a run at work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.control.status import Status
from deploy.run_folder.lock import writing
from deploy.run_folder.tokenizer import run_tokenizer
from deploy.screen import Part
from deploy.stages.controller_actor import RemoteController, start_controller
from deploy.standing import lines_of, standing_of
from deploy.workers.attach import own_address
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from tests.deploy.commands import Run, refused
from tests.deploy.control.runs import prompts_of
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def at_work(
    workspace: RunConfig, tmp_path_factory: pytest.TempPathFactory, cluster: None
) -> Iterator[tuple[RunConfig, RemoteController]]:
    """A run with workers of its own that goes on until it is stopped."""
    endless = {"iterations": 10_000, "checkpoint_every": 0, "ppg": None}
    config = run_copy(workspace, tmp_path_factory.mktemp("work"), train=endless)
    save_config(config, config.run_dir / "config.yaml")
    folder = config.run_dir
    run_tokenizer(folder, config, lambda: None)  # the command that began it made a note of it
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

    told(config, lambda shown: "rollout-2 working" in shown and "reward-1" in shown)

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


def told(config: RunConfig, condition: Callable[[str], bool]) -> str:
    """What `talipot status` says, once that holds; a run tells its status each second."""
    deadline = time.monotonic() + 30
    while True:
        shown = " ".join(" ".join(map(text_of, lines_of(standing_of(config)))).split())
        if condition(shown):
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)


def text_of(line: list[Part]) -> str:
    return "".join(part if isinstance(part, str) else part[0] for part in line)


def test_status_is_told_by_the_folder_alone(
    run: Run,
    at_work: tuple[RunConfig, RemoteController],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, controller = at_work
    until(controller, lambda status: status.iteration >= 1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of a cluster that is gone
    shown = told(config, lambda shown: "time left about" in shown)
    for said in (
        "state running",
        "stage train",
        "/10000",
        f"cluster {own_address()}",
        "`talipot train` on host",
        "issued",
        "policy score",
        "rollout-",
        " working, ",
        "process",
    ):
        assert said in shown, shown
    assert "--resume" not in shown
    # Groups and names come in the catalogue's order.
    assert shown.index(" score ") < shown.index(" kl ") < shown.index(" entropy ")
    outcome = run("status", str(config.run_dir), "--json")
    found = json.loads(outcome.out)
    assert (found["state"], found["stage"], found["steps"]) == ("running", "train", 10_000)
    assert found["step"] >= 1 and found["seconds_left"] > 0 and found["told_seconds_ago"] < 15
    assert found["metrics"]["score"] == pytest.approx(found["metrics"]["score"])
    assert {worker["state"] for worker in found["workers"]} <= {"starting", "working", "draining"}


def jobs() -> int:
    """Programs that have ever joined the cluster."""
    return len(ray._private.state.state.job_table())


def test_the_controller_itself_is_asked_on_demand(
    run: Run, at_work: tuple[RunConfig, RemoteController], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, controller = at_work
    until(controller, lambda status: status.iteration >= 1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # the run's folder knows a better one
    folder, told = str(config.run_dir), config.folder.status
    told.unlink()
    told.mkdir()  # nothing can be told by it
    try:
        assert json.loads(run("status", folder, "--json").out)["told_at"] is None
        outcome = run("status", folder, "--live", "--json")
        assert (outcome.code, outcome.error) == (0, "")
        found = json.loads(outcome.out)
        assert found["step"] >= 1 and found["told_seconds_ago"] < 5
        assert {worker["name"].partition("-")[0] for worker in found["workers"]} == {
            "rollout",
            "reward",
        }
        assert "rollout-" in run("status", folder, "--live").out
    finally:
        told.rmdir()
    refused(run("status", folder, "--live", "--watch"), 2, "--live or --watch")
    refused(run("status", folder, "--address", own_address()), 2, "--live")
    refused(run("status", folder, "--live", "--address", "127.0.0.1:1"), 5, "127.0.0.1:1")


def test_status_joins_no_cluster_unless_it_is_asked_to(
    at_work: tuple[RunConfig, RemoteController],
) -> None:
    config, controller = at_work
    until(controller, lambda status: status.iteration >= 1)
    command = [sys.executable, "-m", "deploy.cli", "status", str(config.run_dir.absolute())]
    before = jobs()
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert jobs() == before
    subprocess.run([*command, "--live"], check=True, capture_output=True, cwd=ROOT)
    assert jobs() == before + 1


def test_a_run_is_found_by_its_folder_whatever_cluster_is_newest(
    run: Run, at_work: tuple[RunConfig, RemoteController], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, controller = at_work
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = controller.status().rollout_workers
    scaled = run("scale", str(config.run_dir), "--actors", str(before))
    assert (scaled.code, scaled.error) == (0, "")
    refused(run("train", "--resume", str(config.run_dir), "--stop-after", "3"), 2, "--stop-after")
    # One of the same name in another folder, of another cluster.
    other = run_copy(config, config.run_dir.parent / "other")
    save_config(other, other.run_dir / "config.yaml")
    refused(run("scale", str(other.run_dir), "--actors", "2"), 5, "is not running", "--resume")
    with writing(other.run_dir, "train", own_address()):
        refused(
            run("scale", str(other.run_dir), "--actors", "2"), 5, "is not at work in this cluster"
        )


def test_a_run_that_does_not_run_is_one_line(
    run: Run, workspace: RunConfig, tmp_path: Path
) -> None:
    idle = run_copy(workspace, tmp_path)
    folder = idle.run_dir.rename(tmp_path / "idle")
    save_config(idle, folder / "config.yaml")
    refused(run("scale", str(folder), "--actors", "2"), 5, "is not running", "--resume")
    with writing(folder, "sft"):
        outcome = run("scale", str(folder), "--actors", "2")
        refused(outcome, 5, "`talipot sft` on host", "no controller now")
        assert "--resume" not in outcome.error, "nobody resumes a run that works"
    refused(run("scale", str(tmp_path), "--actors", "2"), 3, "not a run")
