"""The whole loop on a real Ray cluster: determinism, resume, algorithms, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from common.config.run import RunConfig
from common.endings import at_the_end
from common.errors import CheckpointError, TrainingError
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.deploy.control.runs import Run, finish
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_run_trains_every_rollout_once_and_logs_it(
    reference: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, facts = reference
    assert facts["finished"]
    assert facts["rollouts_trained"] == 4 * 16
    logged = [
        row
        for path in sorted((config.run_dir / "trajectories").glob("*.parquet"))
        for row in from_table(pq.read_table(path).drop_columns("iteration"), ScoredTrajectory)
    ]
    ids = [row.rollout_id for row in logged]
    assert len(ids) == len(set(ids)) == 64
    versions = {row.rollout_id[:6]: row.policy_version for row in logged}
    assert versions == {f"{i:06d}": i for i in range(4)}, "synchronous: no rollout is stale"
    metrics = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 4
    assert all('"staleness/0": 16.0' in line and "staleness/1" not in line for line in metrics)
    assert '"auxiliary/clone_kl_first": 0.0' in metrics[1]


def test_one_seed_gives_one_result_and_another_seed_another(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    again = finish(run_copy(workspace, tmp_path / "a"), gang)
    assert again["weights_hash"] == reference[1]["weights_hash"]
    other = run_copy(workspace, tmp_path / "b").model_copy(update={"seed": 7})
    assert finish(other, gang)["weights_hash"] != again["weights_hash"]


@pytest.mark.parametrize("actors", [1, 4])
def test_the_number_of_actors_changes_nothing(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    actors: int,
) -> None:
    """Invariant I5."""
    config = run_copy(workspace, tmp_path, rollout={"actors": actors})
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    stop: int,
) -> None:
    """Stopped inside a phase (auxiliary memory half full) and at its end."""
    config = run_copy(workspace, tmp_path)
    first = finish(config, gang, stop_after=stop)
    assert not first["finished"]
    second = finish(config, gang)
    assert second["finished"]
    assert second["weights_hash"] == reference[1]["weights_hash"]
    assert second["rollouts_issued"] == 64


def test_resume_keeps_the_kl_controller_and_the_masters_of_bf16(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    train = {"kl_target": 0.5, "kl_horizon": 50, "ppg": None}
    learner = {"precision": "bf16", "zero_stage": 1}
    whole = run_copy(workspace, tmp_path / "whole", train=train, learner=learner)
    parts = run_copy(workspace, tmp_path / "parts", train=train, learner=learner)
    expected = finish(whole, gang)["weights_hash"]
    finish(parts, gang, stop_after=2)
    assert finish(parts, gang)["weights_hash"] == expected
    logs = [(c.run_dir / "metrics.jsonl").read_text().splitlines() for c in (whole, parts)]
    coefficients = [[json.loads(x)["metrics"]["kl_coef"] for x in log] for log in logs]
    assert coefficients[0] == coefficients[1]
    assert len(set(coefficients[0])) == 4


def test_a_damaged_checkpoint_is_passed_over_or_named(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    finish(config, gang, stop_after=3)
    newest = sorted((config.run_dir / "checkpoints").iterdir())[-1]
    (newest / "state.json").write_text("{", encoding="utf8")
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]
    for folder in (config.run_dir / "checkpoints").iterdir():
        (folder / "state.json").write_text("{", encoding="utf8")
    with pytest.raises(CheckpointError, match="damaged"):
        finish(config, gang)


@pytest.mark.parametrize("how", ["merged", "unmerged"])
def test_adapters_are_trained_on_what_they_sampled(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, how: str
) -> None:
    """Also after a resume; the adapter itself sampled, not the base that it has left."""
    train = {"lora": {"rank": 4}, "iterations": 3, "lr": 0.05, "ppg": None, "kl_coef": 0.0}
    config = run_copy(workspace, tmp_path, train=train, rollout={"lora": how})
    finish(config, gang, stop_after=2)
    assert finish(config, gang)["finished"]
    rows = from_table(read_log(config.run_dir, 2)[0], ScoredTrajectory)
    assert {row.adapter for row in rows} == {"policy"}
    assert {row.policy_version for row in rows} == {2}
    away = [abs(sum(row.behavior_logprobs) - sum(row.ref_logprobs)) for row in rows]
    assert max(away) > 0.1


def test_everything_starts_at_once(workspace: RunConfig, tmp_path: Path) -> None:
    """Actors and reward workers are there when the gang is, not some seconds after."""
    config = run_copy(workspace, tmp_path)
    gang = LearnerGang(config, "at-once", start=False)
    with Run(config, gang, start=False) as controller:
        with at_the_end(controller.own_workers.end):
            controller.own_workers.start()
            pools = controller.collector.rollout, controller.collector.reward
            workers = [w for pool in pools if pool for w in pool.workers.values()]
            assert len(workers) == 3, "asked for while the gang started"
            # Looked after while it begins: whoever answers in that time works from then on.
            for worker in workers:
                ray.get(worker.handle.__ray_call__.remote(lambda _: None))
            gang.begin_train(config, controller.collector.tend)
            assert [w.state for w in workers] == ["working"] * 3
        assert not gang.started


def test_nan_weights_stop_the_run(workspace: RunConfig, gang: LearnerGang, tmp_path: Path) -> None:
    config = run_copy(workspace, tmp_path, train={"lr": 1e30, "value_lr": 1e30, "ppg": None})
    with pytest.raises(TrainingError, match="iteration"):
        finish(config, gang)
