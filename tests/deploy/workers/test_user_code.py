"""What user code does to its worker: named and over, never a loop of dying workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.run import RunConfig
from common.devices import compute_of
from common.errors import ClusterError, ConfigError, RewardError, WorkerError
from common.out_of_memory import memory_for, says_out_of_memory
from common.wire.trajectory import Rollout, to_table
from deploy.workers.calls import WorkerLost, start_pair
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool
from learner.rank import LearnerRank
from reward_service.service import RewardWorker, ScoreFacts
from tests.reward_service.samples import rollouts
from tests.workspaces import run_copy

FUNCTIONS = "tests.reward_service.functions"


@pytest.fixture
def pool(cluster: None, workspace: RunConfig, tmp_path: Path) -> Iterator[Callable[[str], Pool]]:
    """A pool of one reward worker that asks this function, and outlives one death."""
    made: list[Pool] = []

    def make(target: str) -> Pool:
        config = run_copy(
            workspace,
            tmp_path,
            reward_service={"components": {"mine": {"kind": "function", "target": target}}},
            cluster={"max_restarts": 0},
        )
        run = config.run_dir
        sft = run / "sft" / "policy.safetensors"
        made.append(reward_pool(config, tmp_path.name, run / "tokenizer.json", sft, None))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def tend_until(pool: Pool, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not done():
        assert time.monotonic() < deadline, "not within 90 s"
        pool.tend()
        time.sleep(0.02)


def score(pool: Pool) -> ScoreFacts:
    """One call to a worker that has started, as the collector makes it."""
    tend_until(pool, lambda: pool.free(1) is not None)
    worker = pool.free(1)
    assert worker is not None
    worker.busy += 1
    table = to_table(rollouts(3), Rollout)
    facts, _ = start_pair(worker.handle, RewardWorker.score, table)
    return pool.result(facts, worker.name)


def test_what_would_end_a_worker_is_an_error_of_the_function(pool: Callable[[str], Pool]) -> None:
    here = pool(f"{FUNCTIONS}:exits")
    with pytest.raises(RewardError, match=f"{FUNCTIONS}:exits raised SystemExit: 0") as caught:
        score(here)
    assert caught.value.exit_code == 7
    assert here.failures == 0, "the worker lives"


def test_a_module_that_ends_its_program_is_refused_at_the_start(
    pool: Callable[[str], Pool],
) -> None:
    here = pool("tests.reward_service.exiting_module:f")
    with pytest.raises(ConfigError, match=r"exiting_module raised SystemExit: 2 \(/"):
        tend_until(here, lambda: here.failures > 0)
    assert here.failures == 0 and len(here.workers) == 1


def test_a_death_in_user_code_is_bounded_and_hints_at_it(pool: Callable[[str], Pool]) -> None:
    here = pool(f"{FUNCTIONS}:ends_its_process")
    with pytest.raises(WorkerError, match=f"died: .*; {FUNCTIONS}:ends_its_process runs in these"):
        for _ in range(4):
            with contextlib.suppress(WorkerLost):
                score(here)
    assert here.failures == 2


def test_a_rollout_actor_without_memory_for_its_cache_ends_the_run(
    cluster: None, workspace: RunConfig, tmp_path: Path
) -> None:
    # More than the address space holds: whoever overcommits cannot promise it either.
    config = run_copy(
        workspace, tmp_path, rollout={"cache_mb": 2.0**40, "slots": 2**30, "lease_size": 2**30}
        | {"kernels": "torch"}, train={"prompts_per_iteration": 2**30},
    )  # fmt: skip
    run = config.run_dir
    here = rollout_pool(config, tmp_path.name, run / "tokenizer.json", run / "sft")
    try:
        with pytest.raises(ClusterError, match=r"in a rollout actor: lower rollout\.cache_mb"):
            tend_until(here, lambda: here.failures > 0)
        assert here.failures == 0
    finally:
        here.stop()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        pytest.param(None, id="torch on the processor"),
    ],
)
def test_memory_that_runs_out_names_the_setting(error: Exception | None) -> None:
    with (
        pytest.raises(ClusterError, match=r"out of memory in a pass: lower it \(") as caught,
        memory_for("a pass", "lower it"),
    ):
        if error is not None:
            raise error
        torch.empty(2**50)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 5
    with pytest.raises(RuntimeError, match="of another kind"), memory_for("a pass", "lower it"):
        raise RuntimeError("of another kind")
    assert not says_out_of_memory(KeyError("memory"))


def test_a_rank_that_runs_out_of_memory_is_not_built_again() -> None:
    rank = LearnerRank(0, 1, compute_of(cpus=1))

    class Stage:
        def advance(self, steps: int, *, anew: bool) -> Any:
            raise MemoryError

    rank._stage = Stage()  # type: ignore[assignment]
    with pytest.raises(ClusterError, match=r"lower learner\.micro_batch_tokens"):
        rank.advance(1)
