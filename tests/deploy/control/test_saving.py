"""Ranks write checkpoints while the run goes on; whatever happens meanwhile, no weight changes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from common.config.run import RunConfig
from common.errors import StorageError
from deploy.run_folder import checkpoints
from deploy.workers.gang import LearnerGang
from learner import checkpointing
from learner.zero.state_files import Snapshot
from tests.deploy.control.runs import Run, finish
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    made = LearnerGang(workspace, "saving-tests")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def undisturbed(
    workspace: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Weights' hash of a run without checkpoints."""
    config = run_copy(workspace, tmp_path_factory.mktemp("whole"), train={"checkpoint_every": 0})
    found: str = finish(config, gang)["weights_hash"]
    return found


def hold_until(_: object, path: str) -> None:
    """In a rank: hash nothing before this file exists."""
    whole = checkpointing.file_digest

    def patient(of: Path) -> str:
        while not Path(path).exists():
            time.sleep(0.005)
        return whole(of)

    checkpointing.file_digest = patient  # type: ignore[assignment]


def die_writing(_: object, call: int) -> None:
    """In a rank: SIGKILL as it begins to write a file for the call-th time."""
    whole, count = Snapshot.write, 0

    def mortal(self: Snapshot, folder: Path) -> Path:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, folder)

    Snapshot.write = mortal  # type: ignore[method-assign]


def tell(gang: LearnerGang, what: Any, *args: Any) -> None:
    gang.start()
    ray.get([rank.__ray_call__.remote(what, *args) for rank in gang.ranks[1:]])


def test_the_next_phase_begins_before_a_checkpoint_is_written(
    workspace: RunConfig,
    gang: LearnerGang,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it becomes one as soon as it is, in the midst of the phase, without an end of that."""
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1, "keep_checkpoints": 9})
    go_on, first = tmp_path / "go on", config.folder.checkpoint(1)
    seen: list[tuple[bool, bool]] = []
    tell(gang, hold_until, str(go_on))
    with Run(config, gang) as controller:
        whole = controller.gang.policy_phase

        def phase(iteration: int, *args: Any, **named: Any) -> dict[str, float]:
            if iteration == 1:
                before = first.exists()
                go_on.touch()
            found = whole(iteration, *args, **named)
            if iteration == 1:
                until = time.monotonic() + 20
                while not first.exists() and time.monotonic() < until:
                    controller.position.settle_checkpoint()
                seen.append((before, first.exists()))
            return found

        monkeypatch.setattr(controller.gang, "policy_phase", phase)
        facts = controller.run()
    gang.stop()  # its ranks wait for a file
    assert facts["weights_hash"] == undisturbed
    assert seen == [(False, True)]
    for step in range(1, config.train.iterations + 1):
        assert checkpoints.is_whole(config.folder.checkpoint(step)), step
    assert not list(config.folder.checkpoints.glob("*.partial"))


@pytest.mark.parametrize("call", [1, 4])
def test_sigkill_while_it_writes_costs_what_came_after_the_checkpoint_before(
    workspace: RunConfig, gang: LearnerGang, undisturbed: str, tmp_path: Path, call: int
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    tell(gang, die_writing, call)
    facts = finish(config, gang)
    assert facts["learner_restarts"] == 1
    assert facts["weights_hash"] == undisturbed
    assert facts["rollouts_trained"] == facts["rollouts_issued"] == 64
    assert not list(config.folder.checkpoints.glob("*.partial"))


def test_a_disk_that_is_full_ends_the_run_and_says_how_to_go_on(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    tell(gang, fill_the_disk)
    with Run(config, gang) as controller, pytest.raises(StorageError) as error:
        controller.run()
    gang.stop()
    assert "checkpoint could not be written (" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "--resume" in str(error.value)
    assert not list(config.folder.checkpoints.glob("*"))


def fill_the_disk(_: object) -> None:
    def full(*_: Any) -> Path:
        raise StorageError("No space left on device")

    Snapshot.write = full  # type: ignore[assignment, method-assign]
