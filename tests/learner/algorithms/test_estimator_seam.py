"""The seam of algorithms: one is added here, and a learner trains with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config.algorithms import ALGORITHMS, Needs
from common.config.run import RunConfig
from learner.algorithms.estimators import ESTIMATORS, Estimate, Outcomes
from learner.learner import Learner
from tests.scored import trajectories
from tests.workspaces import run_copy


def best_of_group(outcomes: Outcomes) -> Estimate:
    """1 on every token of a prompt's best response, -1 on those of the others."""
    scores_B, _ = outcomes.rewards.per_sequence()
    best_B = torch.stack([scores_B[outcomes.groups_B == g].max() for g in outcomes.groups_B])
    return Estimate(torch.where(scores_B == best_B, 1.0, -1.0)[:, None] * outcomes.mask_BR)


@pytest.mark.usefixtures("one_rank")
def test_a_toy_algorithm_is_two_rows(
    workspace: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "toy", Needs(least_responses=2))
    monkeypatch.setitem(ESTIMATORS, "toy", best_of_group)
    recipe = {"algorithm": "toy", "samples_per_prompt": 2, "ppg": None, "e_pi": 2}
    config = run_copy(workspace, tmp_path, learner={"ranks": 1}, train=recipe)
    learner = Learner(config, config.run_dir / "sft" / "policy.safetensors", None, (1,))
    before = learner.policy.full_state()
    metrics = learner.policy_phase(trajectories(), 0)
    assert learner.value is None, "it needs no value function"
    assert metrics["policy_loss"].read() != 0.0
    after = learner.policy.full_state()
    assert not torch.equal(before["palm.norm.weight"], after["palm.norm.weight"])


def test_every_algorithm_has_its_estimator() -> None:
    assert ESTIMATORS.keys() == ALGORITHMS.keys()
