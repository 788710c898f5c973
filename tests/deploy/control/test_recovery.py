"""A learner rank that dies: SIGKILL inside a phase and inside a checkpoint's write."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from common.config.run import RunConfig
from common.errors import DataError, WorkerError
from common.randomness import derive_seed
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.run_folder.events import read_events
from deploy.run_folder.log_lines import read_lines
from deploy.stages.replay import replay_run
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from learner.zero.engine import ZeroEngine
from tests.deploy.control.runs import Run, finish
from tests.deploy.control.test_dynamic_sampling import dynamic
from tests.reward_service.endpoint import Endpoint, Reply, Rows, scores
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")

Logs = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    made = LearnerGang(workspace, "recovery-tests")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def undisturbed(
    workspace: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Logs]:
    """Weights' hash of a synchronous run that nothing happened to, and its log."""
    config = run_copy(workspace, tmp_path_factory.mktemp("whole"))
    return finish(config, gang)["weights_hash"], logs(config)


def logs(config: RunConfig) -> Logs:
    """What a run logs of its responses and of its losses, by iteration: nothing of the clock."""
    of_batch = ("component/", "score", "kl", "response_length", "policy_loss", "value_loss")
    return {
        line.step: {
            n: value
            for n, value in line.metrics.items()
            if n.startswith(of_batch) and n != "score_seconds"
        }
        for line in read_lines(config.folder.metrics).lines
        if line.stage == "train"
    }


def arm(gang: LearnerGang, method: str, call: int) -> None:
    """Rank 1 kills itself with SIGKILL as it enters the call-th call of an engine's method."""
    gang.start()
    ray.get(gang.ranks[1].__ray_call__.remote(_arm, method, call))


def _arm(_: object, method: str, call: int) -> None:
    whole, count = getattr(ZeroEngine, method), 0

    def mortal(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(ZeroEngine, method, mortal)


# An iteration takes 4 optimizer steps (2 of each network), the phase after the second 4 more.
@pytest.mark.parametrize(
    ("method", "call", "every"),
    [
        pytest.param("step", 6, 0, id="policy phase, no checkpoint yet", marks=pytest.mark.chaos),
        pytest.param("step", 10, 1, id="auxiliary phase"),
        pytest.param("fragments", 4, 1, id="inside a checkpoint's write", marks=pytest.mark.chaos),
    ],
)
def test_sigkill_of_a_rank_changes_no_weight(
    workspace: RunConfig,
    gang: LearnerGang,
    undisturbed: tuple[str, Logs],
    tmp_path: Path,
    method: str,
    call: int,
    every: int,
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": every})
    arm(gang, method, call)
    facts = finish(config, gang)
    assert facts["learner_restarts"] == 1
    assert (facts["weights_hash"], logs(config)) == undisturbed
    assert all("component/reward_model" in metrics for metrics in logs(config).values())
    lines = [x for x in read_lines(config.folder.metrics).lines if x.stage == "train"]
    assert all(line.metrics["tokens_per_second"] > 0 for line in lines)
    assert facts["rollouts_trained"] == facts["rollouts_issued"] == 64
    assert not list((config.run_dir / "checkpoints").glob("*.partial"))


@pytest.mark.chaos
def test_prompts_in_place_of_others_are_asked_again(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """A rank dies while it trains on a batch that dynamic sampling has filled up."""
    whole = finish(dynamic(workspace, tmp_path / "whole", checkpoint_every=1), gang)
    config = dynamic(workspace, tmp_path / "killed", checkpoint_every=1)
    arm(gang, "step", 3)
    facts = finish(config, gang)
    assert facts["learner_restarts"] == 1
    for name in ("weights_hash", "rollouts_issued", "rollouts_trained", "rollouts_dropped"):
        assert facts[name] == whole[name], name


@pytest.mark.chaos
def test_an_asynchronous_run_goes_on_within_its_bounds_and_can_be_replayed(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    train = {"max_staleness": 2, "iterations": 6, "checkpoint_every": 2}
    config = run_copy(workspace, tmp_path, train=train)
    arm(gang, "step", 18)  # in iteration 3, of which 2 is the newest checkpoint
    facts = finish(config, gang)
    assert facts["learner_restarts"] == 1
    assert facts["rollouts_trained"] == 6 * 16
    rows = [
        row
        for path in sorted((config.run_dir / "trajectories").glob("*.parquet"))
        for row in from_table(pq.read_table(path).drop_columns("iteration"), ScoredTrajectory)
    ]
    assert len({row.rollout_id for row in rows}) == len(rows) == 6 * 16
    assert {int(row.rollout_id[:6]) - row.policy_version for row in rows} <= {0, 1, 2}

    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    console = Console(file=io.StringIO())
    assert replay_run(config, console)["replayed_hash"] == facts["weights_hash"]
    assert before == {p: p.read_bytes() for p in config.run_dir.rglob("*") if p.is_file()}
    log = config.run_dir / "trajectories" / "iteration-000002.parquet"
    log.write_bytes(log.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"iteration-000002\.parquet: damaged"):
        replay_run(config, console)
    log.unlink()
    with pytest.raises(DataError, match=r"iteration-000002\.parquet: no such"):
        replay_run(config, console)
    other = config.run_dir / "trajectories" / "iteration-000001.parquet"
    log.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"iteration-000002\.parquet: .*iteration 1"):
        replay_run(config, console)


@pytest.mark.chaos
def test_grpo_goes_on_without_what_an_endpoint_refuses_and_can_be_replayed(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """A quarter of the responses gets no score, in asynchronous mode, and a rank dies."""

    def refuses(rollout_id: str) -> bool:
        return derive_seed(rollout_id) % 4 == 0

    def answer(number: int, rows: Rows) -> Reply:
        (row,) = rows
        if refuses(row["rollout_id"]):
            return Reply(status=400)
        return scores([(row["rollout_id"], len(row["response"]))])

    train = {
        "algorithm": "grpo",
        "prompts_per_iteration": 8,
        "samples_per_prompt": 2,
        "ppg": None,
        "max_staleness": 2,
        "iterations": 4,
        "checkpoint_every": 2,
    }
    ids = [[f"{i:06d}-{j:06d}" for j in range(16)] for i in range(4)]
    whole = [
        pair
        for of_one in ids
        for pair in zip(of_one[::2], of_one[1::2], strict=True)
        if not any(map(refuses, pair))
    ]
    dead = sum(refuses(i) for of_one in ids for i in of_one)
    with Endpoint(answer) as endpoint:
        judge = {"kind": "http", "target": endpoint.url, "batch_size": 1}
        components = {"components": {"judge": judge}}
        config = run_copy(workspace, tmp_path, train=train, reward_service=components)
        arm(gang, "step", 7)  # in iteration 3, of which 2 is the newest checkpoint
        with Run(config, gang) as controller:
            facts = controller.run()
            ledger = controller.ledger
    assert facts["learner_restarts"] == 1
    assert facts["rollouts_issued"] == facts["rollouts_trained"] + facts["rollouts_dropped"] == 64
    assert ledger.dropped == {"dead letter": dead, "lone": 64 - dead - 2 * len(whole)}
    rows = [r["rollout_id"] for i in range(4) for r in read_log(config.run_dir, i)[0].to_pylist()]
    assert rows == [rollout_id for pair in whole for rollout_id in pair]
    assert facts["rollouts_trained"] == len(rows)
    replayed = replay_run(config, Console(file=io.StringIO()))
    assert replayed["replayed_hash"] == facts["weights_hash"]


def test_a_rank_that_keeps_dying_ends_the_run_and_is_named(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = run_copy(workspace, tmp_path, learner={"max_restarts": 0})
    arm(gang, "step", 3)
    with (
        Run(config, gang) as controller,
        pytest.raises(WorkerError, match=r"learner-1 died in policy_phase.*max_restarts"),
    ):
        controller.run()


def test_lost_tables_are_sampled_again_and_told(
    workspace: RunConfig,
    gang: LearnerGang,
    undisturbed: tuple[str, Logs],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a node dies: `tests/deploy/workers/preemption.py` has one that does."""
    asked: list[int] = []

    def lost_once(refs: list[Any]) -> set[Any]:
        asked.append(len(refs))
        return set(refs[:1]) if len(asked) == 1 else set()

    monkeypatch.setattr("deploy.control.batches.lost_objects", lost_once)
    config = run_copy(workspace, tmp_path)
    assert finish(config, gang)["weights_hash"] == undisturbed[0]
    told = [each.detail for each in read_events(config.folder.events) if "lost" in each.what]
    assert len(told) == 1
    assert told[0].endswith("of iteration 0, with a node; they are sampled again")
