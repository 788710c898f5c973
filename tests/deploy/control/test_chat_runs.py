"""The invariants for a pretrained model: SmolLM2's shape, every ZeRO stage, adapters on and off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from common.config.run import RunConfig
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.chat_runs import LORA, make_chat_workspace
from tests.deploy.control.runs import Run, finish, kill_worker, when
from tests.deploy.control.test_weights_in_a_run import flip
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_chat_workspace(tmp_path_factory.mktemp("chat"), head_dim=8)


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


def rows_of(config: RunConfig) -> list[ScoredTrajectory]:
    logs = [read_log(config.run_dir, i)[0] for i in range(config.train.iterations)]
    return [row for log in logs for row in from_table(log, ScoredTrajectory)]


# I3 is in tests/learner/test_pretrained_training.py.
@pytest.mark.parametrize(
    ("zero", "lora"),
    [
        pytest.param(zero, lora, marks=[] if (zero, lora) == (2, LORA) else [pytest.mark.chaos])
        for lora in (LORA, None)
        for zero in (1, 2, 3)
    ],
    ids=[f"ZeRO {z}, {w}" for w in ("adapters", "whole") for z in (1, 2, 3)],
)
def test_a_chat_model_keeps_every_promise(
    chat: RunConfig, gang: LearnerGang, tmp_path: Path, zero: int, lora: dict[str, Any] | None
) -> None:
    sections = {"learner": {"zero_stage": zero}, "train": {"lora": lora, "checkpoint_every": 1}}
    whole, parts = (run_copy(chat, tmp_path / name, **sections) for name in ("whole", "parts"))
    expected = finish(whole, gang)
    metrics, rows = metrics_of(whole), rows_of(whole)
    assert all(each["ratio_deviation"] < 1e-4 for each in metrics), "I1"
    assert len({row.rollout_id for row in rows}) == len(rows) == 64, "I2"
    assert {(row.policy_version, row.rollout_id[:6]) for row in rows} == {
        (i, f"{i:06d}") for i in range(4)
    }, "I7: synchronous"
    assert metrics[1]["auxiliary/clone_kl_first"] == 0.0, "I8"
    assert 0 < metrics[1]["auxiliary/clone_kl"] < 0.05, "I8"
    assert len({each["kl"] for each in metrics}) == 4, "the policy moves"

    # A byte is flipped on its way (I6), the run is stopped inside a phase and goes on (I4), and
    # an actor is taken away (I5).
    with Run(parts, gang, stop_after=1) as controller:
        victim = next(iter(controller.collector.rollout.workers.values()))
        ray.get(victim.handle.__ray_call__.remote(flip, 1))
        assert not controller.run()["finished"]
    assert metrics_of(parts)[0]["weights_reloaded"] == 1, "I6"
    with Run(parts, gang) as controller:
        thread = when(lambda: controller.iteration >= 2, lambda: controller.scale(1, None))
        facts = controller.run()
        thread.join()
    assert facts["weights_hash"] == expected["weights_hash"], "I4, I5"
    assert facts["rollouts_trained"] == facts["rollouts_issued"] == 64
    assert [row.rollout_id for row in rows_of(parts)] == [row.rollout_id for row in rows]


@pytest.mark.chaos
@pytest.mark.parametrize("lora", [LORA, None], ids=["adapters", "whole"])
def test_an_asynchronous_chat_run_loses_no_rollout_and_bounds_staleness(
    chat: RunConfig, gang: LearnerGang, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """Invariants I2 and I7; an actor and a reward worker are killed."""
    train = {"lora": lora, "max_staleness": 2, "iterations": 6, "checkpoint_every": 2}
    config = run_copy(chat, tmp_path, train=train)
    with Run(config, gang) as controller:
        threads = [
            when(lambda: controller.iteration >= 1, lambda: kill_worker(controller, "rollout")),
            when(lambda: controller.iteration >= 2, lambda: kill_worker(controller, "reward")),
        ]
        facts = controller.run()
        for thread in threads:
            thread.join()
    rows = rows_of(config)
    assert len({row.rollout_id for row in rows}) == len(rows) == 6 * 16
    assert facts["rollouts_trained"] == facts["rollouts_issued"] == 6 * 16
    assert {int(row.rollout_id[:6]) - row.policy_version for row in rows} <= {0, 1, 2}
