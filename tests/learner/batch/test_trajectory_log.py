"""The trajectory log: what is written is read back, and so are logs of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from common.config.run import RunConfig
from common.errors import DataError
from common.run_folder import RunFolder
from common.wire.trajectory import ScoredTrajectory, from_table, to_table
from learner.batch.trajectory_log import Learnt, read_learnt, read_log, write_log


def trajectories(adapter: str) -> list[ScoredTrajectory]:
    return [
        ScoredTrajectory(
            rollout_id=f"000000-{index:06d}",
            group=index,
            prompt_uid="p",
            prompt_text="a",
            prompt_ids=[1],
            seed=index,
            adapter=adapter,
            response_ids=[2, 3],
            response_text="b",
            behavior_logprobs=[-1.0, -2.0],
            finish_reason="eos",
            policy_version=0,
            weights_fingerprint="f",
            actor_id="a",
            score=0.5,
            score_components={"x": 0.5},
            ref_logprobs=[-1.0, -2.0],
            reward_version=0,
        )
        for index in range(3)
    ]


def learnt() -> Learnt:
    numbers = torch.zeros(3, 2)
    return Learnt(
        learner_logprobs_NR=numbers,
        rewards_NR=numbers.double(),
        kl_penalties_NR=numbers.double(),
        values_NR=None,
        advantages_NR=numbers,
        mask_NR=torch.ones(3, 2, dtype=torch.bool),
    )


def written(run_dir: Path, adapter: str) -> Path:
    path = RunFolder(run_dir).trajectories(0)
    path.parent.mkdir(parents=True)
    write_log(path, to_table(trajectories(adapter), ScoredTrajectory), learnt(), 0, RunConfig())
    return path


def test_a_log_names_its_iteration_in_every_row(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).trajectories(7)
    path.parent.mkdir(parents=True)
    write_log(path, to_table(trajectories(""), ScoredTrajectory), learnt(), 7, RunConfig())
    whole = pq.read_table(path)
    assert whole.column_names[:2] == ["iteration", "rollout_id"]
    assert whole["iteration"].to_pylist() == [7, 7, 7]
    assert from_table(whole, ScoredTrajectory) == trajectories("")
    # One of an earlier version has no such column, and is read as the same.
    assert read_log(tmp_path, 7)[0].column_names[0] == "rollout_id"
    assert read_learnt(tmp_path, 7)[0]["iteration"].to_pylist() == [7, 7, 7]
    pq.write_table(whole.drop_columns(["iteration"]), path)
    assert read_learnt(tmp_path, 7)[0]["iteration"].to_pylist() == [7, 7, 7]
    assert from_table(read_log(tmp_path, 7)[0], ScoredTrajectory) == trajectories("")


def test_a_log_says_which_adapter_sampled(tmp_path: Path) -> None:
    written(tmp_path, "policy")
    table, _ = read_log(tmp_path, 0)
    assert from_table(table, ScoredTrajectory) == trajectories("policy")


def test_a_log_from_before_there_were_adapters_is_of_whole_weights(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    old = pq.read_table(path).drop_columns(["adapter", "unfiltered_logprobs"])
    note = json.loads(old.schema.metadata[b"talipot"])
    del note["config"]["rollout"]["lora"], note["config"]["train"]["lora"]
    old = old.replace_schema_metadata({b"talipot": json.dumps(note)})
    pq.write_table(old, path)
    table, config = read_log(tmp_path, 0)
    assert from_table(table, ScoredTrajectory) == trajectories("")
    assert config == RunConfig()


def test_a_log_that_lacks_more_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    pq.write_table(pq.read_table(path).drop_columns(["seed"]), path)
    with pytest.raises(DataError, match="damaged or no trajectory log"):
        read_log(tmp_path, 0)
