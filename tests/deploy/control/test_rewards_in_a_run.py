"""Reward components in a whole run: functions, and endpoints that give up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from common.config.run import RunConfig
from common.errors import RewardError
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.deploy.control.runs import finish
from tests.workspaces import run_copy

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


def test_sources_come_in_their_shares_and_have_scores_of_their_own(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    files = {"a/b": ["open", "read"], "few": ["file", "close", "name"]}
    for name, words in files.items():
        rows = [{"prompt": f"{word}:", "of": name} for word in words]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{words[0]}.jsonl").write_text(lines, encoding="utf8")
    mixture = {"a/b": {"weight": 3.0}, "few": {"limit": 2}}
    config = run_copy(
        workspace,
        tmp_path / "runs",
        data={
            "prompts": [str(tmp_path / "*.jsonl")],
            "mixture": mixture,
            "source_column": "of",
            "columns": [],
        },
        reward_service={
            "components": {"of": {"kind": "function", "target": "tests.rewards:of_source"}}
        },
    )
    finish(config, gang)
    for iteration in range(config.train.iterations):
        rows = from_table(read_log(config.run_dir, iteration)[0], ScoredTrajectory)
        assert Counter(row.source for row in rows) == {"a/b": 12, "few": 4}
        assert {row.prompt_text for row in rows if row.source == "few"} <= {"file:", "close:"}
        assert all(row.score == len(row.source or "") for row in rows)
    first = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])["metrics"]
    assert (first["score/a:b"], first["score/few"], first["score"]) == (3.0, 3.0, 3.0)


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
