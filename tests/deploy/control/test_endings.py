"""Endings on a disk that is full: every worker ends, and what failed is said after."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray
from rich.console import Console

from common.config.run import RunConfig
from common.endings import at_the_end, take_all
from common.errors import StorageError
from deploy.run_folder.metrics_log import RunLog
from deploy.stages.controller_actor import RemoteController, start_controller
from deploy.stages.session import Session
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool
from deploy.workers.scaling import Elastic
from deploy.workers.worker import Event
from tests.deploy.control.runs import prompts_of
from tests.deploy.control.simulated import Rig, is_running, process_of
from tests.workspaces import run_copy

FULL = Path("/dev/full")
"""Opens, and refuses every byte like a disk without room."""


def full(_: Event) -> None:
    raise StorageError("no space left")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_step_is_taken_and_the_first_failure_is_raised() -> None:
    taken: list[str] = []

    def step(name: str, error: type[BaseException] | None = None) -> None:
        taken.append(name)
        if error is not None:
            raise error(name)

    with pytest.raises(KeyboardInterrupt, match="b"):
        take_all(
            partial(step, "a"),
            partial(step, "b", KeyboardInterrupt),
            partial(step, "c", OSError),
            partial(step, "d"),
        )
    assert taken == list("abcd")
    with pytest.raises(ValueError, match="the block"), at_the_end(partial(step, "e", OSError)):
        raise ValueError("the block")
    assert taken[-1] == "e"


def test_a_pool_ends_every_worker_though_it_cannot_report_one(cluster: None) -> None:
    here = Rig(2)
    here.pump_until(lambda: len(here.working()) == 2)
    pids = [worker.pid for worker in here.pool.workers.values()]
    here.pool.report = full
    with pytest.raises(StorageError, match="no space left"):
        here.pool.stop()
    assert not here.pool.workers
    until(lambda: not any(map(is_running, pids)))


def test_a_gang_ends_every_rank_though_one_cannot_be_ended(
    workspace: RunConfig, cluster: None
) -> None:
    @ray.remote(num_cpus=0.1)
    class Rank:
        pass

    gang = LearnerGang(workspace, "endings", start=False)
    real = Rank.remote()
    pid = process_of(real)
    gang.ranks = ["no handle of an actor", real]
    with pytest.raises(ValueError, match="actor"):
        gang.stop()
    assert not gang.started
    until(lambda: not is_running(pid))


def test_a_session_ends_all_that_it_holds(workspace: RunConfig) -> None:
    ended: list[str] = []

    class End:
        def __init__(self, name: str) -> None:
            self.name = name

        def stop(self) -> None:
            ended.append(self.name)
            raise StorageError(self.name)

    session = Session(workspace, Console())
    for name in ("rollout", "reward"):
        session.keep(End(name))  # type: ignore[arg-type]
    session._gang = End("gang")  # type: ignore[assignment]
    with pytest.raises(StorageError):
        session.close()
    assert sorted(ended) == ["gang", "reward", "rollout"]
    session.close()
    assert len(ended) == 3, "what has ended is not ended again"


def test_the_log_of_a_full_disk_closes_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    log = RunLog(tmp_path)
    with pytest.raises(StorageError, match="metrics cannot be written"):
        log.write("train", 1, {"score": 1.0})
    with pytest.raises(StorageError, match="metrics cannot be written"):
        log.close()
    assert log._board.file_writer is None, "the other half was closed all the same"


def test_a_command_to_scale_holds_as_a_whole(workspace: RunConfig, tmp_path: Path) -> None:
    """The first event cannot be written: both wishes hold, and the command hears of it."""
    config = workspace.model_copy(update={"output": str(tmp_path), "name": "run"})
    config.run_dir.mkdir()
    (config.run_dir / "events.jsonl").symlink_to(FULL)
    pools = [Pool(kind=k, make=lambda name: None, max_failures=0) for k in ("rollout", "reward")]
    elastic = Elastic(config, *pools)
    with pytest.raises(StorageError, match=f"events.jsonl.*{errno.ENOSPC}"):
        elastic.scale(3, 2)
    assert [pool.target for pool in pools] == [3, 2]


@pytest.mark.chaos
def test_a_run_whose_events_cannot_be_written_ends_with_its_workers(
    workspace: RunConfig, tmp_path: Path, cluster: None
) -> None:
    """Neither the workers nor whoever waits for the outcome is left behind."""
    config = run_copy(workspace, tmp_path)
    (config.run_dir / "events.jsonl").symlink_to(FULL)
    name, folder = "full-disk", config.run_dir
    tokenizer, sft = folder / "tokenizer.json", folder / "sft" / "policy.safetensors"
    reward = folder / "reward_model" / "reward.safetensors"
    pools = (
        rollout_pool(config, name, tokenizer, sft, start=False),
        reward_pool(config, name, tokenizer, sft, reward, start=False),
    )
    gang = LearnerGang(config, name, start=False)
    controller = start_controller(config, prompts_of(config), gang, pools, None, detached=False)
    with pytest.raises(StorageError, match=r"events\.jsonl"):
        raise_outcome(controller)
    until(lambda: not named(name))
    controller.end()


def raise_outcome(controller: RemoteController) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        ray.get(controller.start_outcome(1.0), timeout=90)
    raise AssertionError("nobody who waits for the outcome is told")


def named(run: str) -> list[str]:
    """Living actors whose names begin with a run's."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in listed if actor["name"].startswith(f"{run}:")]
