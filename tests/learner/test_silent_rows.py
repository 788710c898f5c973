"""Responses of groups with one score are not computed, and the step is the same without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from common.config.run import RunConfig
from learner.learner import Learner
from learner.objectives.policy import PolicyObjective
from tests.scored import trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("one_rank")
GROUPS = 12
"""Of two responses each."""


def scored(equal: int) -> list[pa.Table]:
    """Trajectories of which the first `equal` groups have one score each."""
    tables = []
    for table in trajectories(2 * GROUPS):
        groups = table["group"].to_pylist()
        scores = [
            float(group) if group < equal else score
            for group, score in zip(groups, table["score"].to_pylist(), strict=True)
        ]
        place = table.schema.get_field_index("score")
        tables.append(table.set_column(place, table.field("score"), pa.array(scores, pa.float32())))
    return tables


def trained(
    workspace: RunConfig, folder: Path, equal: int, **train: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
    """Weights, metrics, and how many rows were computed with gradients."""
    recipe = {"algorithm": "grpo", "samples_per_prompt": 2, "ppg": None, "adam_eps": 1e-5}
    recipe |= {"missing_eos_penalty": None, **train}  # which would part the scores
    config = run_copy(workspace, folder, learner={"ranks": 1}, train={"kl_coef": 0.0, **recipe})
    learner = Learner(config, config.run_dir / "sft" / "policy.safetensors", None, (1,))
    counted = [0]
    computed = PolicyObjective.loss

    def loss(self: PolicyObjective, micro: Any, whole: Any) -> Any:
        counted[0] += len(micro.rows)
        return computed(self, micro, whole)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PolicyObjective, "loss", loss)
        metrics = learner.policy_phase(scored(equal), 0)
    state = {name: tensor.clone() for name, tensor in learner.policy.full_state().items()}
    return state, {name: metric.read() for name, metric in metrics.items()}, counted[0]


@pytest.mark.parametrize("aggregation", ["tokens", "sequences", "constant"])
def test_the_step_is_the_same_without_them(
    workspace: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    recipe = {"objective": {"aggregation": aggregation}, "e_pi": 2, "stop_kl": None}
    less, metrics, few = trained(workspace, tmp_path / "less", 8, **recipe)
    monkeypatch.setattr(PolicyObjective, "matters", lambda self, rows: rows)
    whole, before, many = trained(workspace, tmp_path / "whole", 8, **recipe)
    assert (few, many) == (2 * 8, 2 * 24), "two epochs of four groups, and of all"
    assert metrics["equal_groups"] == 8 / GROUPS
    for name, tensor in whole.items():
        torch.testing.assert_close(less[name], tensor, atol=1e-6, rtol=1e-5)
    for name in ("policy_loss", "gradient_norm", "kl", "entropy", "policy_steps"):
        assert metrics[name] == pytest.approx(before[name], abs=1e-6), name
    assert metrics["clip_fraction"] >= before["clip_fraction"], "of fewer tokens"


def test_without_any_signal_the_weights_stay(workspace: RunConfig, tmp_path: Path) -> None:
    start = Learner(
        run_copy(workspace, tmp_path / "start", learner={"ranks": 1}),
        workspace.run_dir / "sft" / "policy.safetensors",
        None,
        (1,),
    ).policy.full_state()
    state, metrics, rows = trained(workspace, tmp_path / "none", GROUPS)
    assert metrics["equal_groups"] == 1.0
    assert metrics["gradient_norm"] == 0.0
    assert rows == 2, "one in each step, which all ranks take"
    for name, tensor in start.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    "train",
    [
        {"entropy_coef": 0.01},
        {"objective": {"kl_loss": {"coef": 0.1}}},
        {"kl_coef": 0.1},
        {"algorithm": "ppo", "samples_per_prompt": 1, "value_network": "shared"},
    ],
)
def test_what_else_is_learnt_from_them_is_learnt(
    workspace: RunConfig, tmp_path: Path, train: dict[str, Any]
) -> None:
    _, metrics, rows = trained(workspace, tmp_path, GROUPS, **train)
    assert rows == 2 * GROUPS * workspace.train.e_pi
    assert metrics["gradient_norm"] > 0.0


def test_the_scores_are_as_they_should_be() -> None:
    tables = scored(8)
    whole = pa.concat_tables(tables).group_by("group").aggregate([("score", "stddev")])
    assert pc.sum(pc.equal(whole["score_stddev"], 0.0)).as_py() == 8
