"""Ranks write checkpoints while the run goes on; whatever happens meanwhile, no weight changes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray

from common.config.run import RunConfig
from common.errors import StorageError, TrainingError
from deploy.run_folder import checkpoints
from deploy.workers.gang import LearnerGang
from learner.zero.state_files import Snapshot
from tests.deploy.control.runs import Run, finish
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
Reference = tuple[RunConfig, dict[str, Any]]
"""An undisturbed run, and what is known of it."""


def hold_until(_: object, path: str) -> None:
    """In a rank: write nothing before this file exists."""
    whole = Snapshot.write

    def patient(self: Snapshot, folder: Path) -> Path:
        while not Path(path).exists():
            time.sleep(0.005)
        return whole(self, folder)

    Snapshot.write = patient  # type: ignore[method-assign]


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
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is written then is what was when it was begun."""
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1, "keep_checkpoints": 9})
    go_on, first = tmp_path / "go on", config.folder.checkpoint(1)
    seen: list[tuple[bool, bool]] = []
    tell(gang, hold_until, str(go_on))
    with Run(config, gang) as controller:
        whole = controller.gang.policy_phase

        def phase(iteration: int, *args: Any, **named: Any) -> dict[str, float]:
            found = whole(iteration, *args, **named)
            if iteration == 1:  # the weights have moved on
                before = first.exists()
                go_on.touch()
                until = time.monotonic() + 20
                while not first.exists() and time.monotonic() < until:
                    controller.position.settle_checkpoint()
                seen.append((before, first.exists()))
            return found

        monkeypatch.setattr(controller.gang, "policy_phase", phase)
        facts = controller.run()
    gang.stop()  # its ranks look for a file
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    assert seen == [(False, True)]
    for step in range(1, config.train.iterations + 1):
        assert checkpoints.is_whole(config.folder.checkpoint(step)), step
    for step in range(2, config.train.iterations + 1):  # and a run that goes on from it is as ever
        shutil.rmtree(config.folder.checkpoint(step))
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]
    assert not list(config.folder.checkpoints.glob("*.partial"))


@pytest.mark.parametrize("call", [1, 4])
def test_sigkill_while_it_writes_costs_what_came_after_the_checkpoint_before(
    workspace: RunConfig, gang: LearnerGang, reference: Reference, tmp_path: Path, call: int
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    tell(gang, die_writing, call)
    facts = finish(config, gang)
    assert facts["learner_restarts"] == 1
    assert facts["weights_hash"] == reference[1]["weights_hash"]
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


def test_rollouts_go_on_while_a_checkpoint_gets_its_name(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1, "iterations": 2})
    whole, turns = checkpoints.Unfinished.finish, list[bool]()
    with Run(config, gang) as controller:
        pump, pumped = controller.collector.pump, 0

        def counted(timeout: float = 0.1) -> None:
            nonlocal pumped
            pumped += 1
            pump(timeout)

        def slowly(self: checkpoints.Unfinished, *args: Any) -> Path:
            before, until = pumped, time.monotonic() + 10
            while pumped < before + 3 and time.monotonic() < until:
                time.sleep(0.005)
            turns.append(pumped >= before + 3)
            return whole(self, *args)

        monkeypatch.setattr(controller.collector, "pump", counted)
        monkeypatch.setattr(checkpoints.Unfinished, "finish", slowly)
        controller.run()
    assert turns == [True, True]
    assert all(checkpoints.is_whole(config.folder.checkpoint(step)) for step in (1, 2))


def test_a_disk_that_is_full_when_it_gets_its_name_ends_the_run(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", full)
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    words = r"could not be written \(.*No space left.*--resume"
    with Run(config, gang) as controller, pytest.raises(StorageError, match=words):
        controller.run()
    gang.stop()
    assert not list(config.folder.checkpoints.glob("*"))


def fill_the_disk(_: object) -> None:
    def full(*_: Any) -> Path:
        raise StorageError("No space left on device")

    Snapshot.write = full  # type: ignore[assignment, method-assign]


def test_what_ends_a_run_does_not_take_the_checkpoint_with_it(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the phase after it, while the ranks are still writing."""
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    tell(gang, hold_until, str(tmp_path / "go on"))
    with Run(config, gang) as controller:
        whole = controller.gang.policy_phase

        def phase(iteration: int, *args: Any, **named: Any) -> dict[str, float]:
            if iteration == 1:
                (tmp_path / "go on").touch()
                raise TrainingError("the loss became nan")
            return whole(iteration, *args, **named)

        monkeypatch.setattr(controller.gang, "policy_phase", phase)
        with pytest.raises(TrainingError, match="became nan"):
            controller.run()
    gang.stop()
    assert checkpoints.is_whole(config.folder.checkpoint(1))
    assert [path.name for path in config.folder.checkpoints.iterdir()] == ["step-000001"]


def test_a_removal_that_is_under_way_hinders_no_restart(tmp_path: Path) -> None:
    """Two remove the same folder: a run that went on, and what it went on from."""
    folder = tmp_path / "checkpoints" / "step-000001.0a.partial"
    for name in range(300):
        (folder / f"{name}").mkdir(parents=True)
    one = Thread(target=checkpoints.remove, args=(folder,))
    one.start()
    checkpoints.rewind(tmp_path, 0)
    one.join()
    assert not folder.exists()


def test_a_file_that_a_rank_names_and_nobody_sees_is_missed(tmp_path: Path) -> None:
    """As on a network file system that is behind."""
    begun = checkpoints.Unfinished(tmp_path, 1)
    (begun.folder / "policy").mkdir()
    (begun.folder / "policy" / "rank-00000.safetensors").write_bytes(b"weights")
    final = begun.finish({}, {"policy/rank-00001.safetensors": "0" * 32})
    assert not checkpoints.is_whole(final)
