"""Reward components in a whole run: functions, and endpoints that give up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.run import RunConfig
from common.errors import RewardError
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.conftest import run_copy
from tests.deploy.control.runs import finish

pytestmark = pytest.mark.usefixtures("cluster")


def test_function_rewards_need_no_reward_model(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    components = {
        "length": {"kind": "function", "target": "tests.rewards:length", "weight": 0.5},
        "constant": {"kind": "function", "target": "tests.rewards:one"},
        "made": {"kind": "function", "target": "tests.rewards:of_parts", "weight": 0.25},
    }
    config = run_copy(workspace, tmp_path, reward_service={"components": components})
    finish(config, gang)
    rows = from_table(read_log(config.run_dir, 0)[0], ScoredTrajectory)
    for row in rows:
        length = len(row.response_text)
        parts = {"made": length, "made/letters": length, "made/two words": 2.0}
        assert row.score_components == {"length": length, "constant": 1.0, **parts}
        assert row.score == pytest.approx(0.75 * length + 1.0)
    first = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])["metrics"]
    lengths = [len(row.response_text) for row in rows]
    assert first["component/length"] == pytest.approx(sum(lengths) / 16), "of all 16, not one call"
    assert first["component/constant"] == 1.0
    assert first["component/made/letters"] == first["component/length"]
    assert first["component/made/two words"] == 2.0


def test_a_broken_reward_function_stops_the_run_and_is_named(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    components = {"bad": {"kind": "function", "target": "tests.rewards:not_a_number"}}
    config = run_copy(workspace, tmp_path, reward_service={"components": components})
    with pytest.raises(RewardError, match=r"tests\.rewards:not_a_number returned nan"):
        finish(config, gang)


def test_a_dead_endpoint_dead_letters_and_says_so(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    endpoint = {"kind": "http", "target": "http://127.0.0.1:9/score", "timeout_s": 0.2}
    components = {"down": endpoint | {"max_retries": 0}}
    config = run_copy(
        workspace,
        tmp_path,
        reward_service={"components": components},
        train={"iterations": 1, "ppg": None},
    )
    with pytest.raises(RewardError, match=r"given up by the reward service.*ConnectError"):
        finish(config, gang)
