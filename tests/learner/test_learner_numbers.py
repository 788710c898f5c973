"""What a real learner makes of a batch whose right numbers are known: one rank, one iteration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.generation.engine import GenerationEngine
from common.config.run import RunConfig
from common.logprobs import sampling_of
from common.models.palm import PaLM
from common.models.weight_files import load_decoder
from common.wire.trajectory import ScoredTrajectory, to_table
from deploy.workers.gang import LearnerGang
from reward_service.models import ReferencePolicy
from tests.actors.generation.asked import requests
from tests.sampled import sampled_trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
EOS = 1


@pytest.fixture(scope="module")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    learner = workspace.learner.model_copy(update={"ranks": 1})
    made = LearnerGang(workspace.model_copy(update={"learner": learner}), "numbers")
    yield made
    made.stop()


def batch(config: RunConfig, scores: list[float], away: float = 0.0) -> pa.Table:
    """What the supervised policy samples, with its own log-probabilities as the reference's.

    Args:
        away: added to the log-probabilities that were sampled with.
    """
    path = config.run_dir / "sft" / "policy.safetensors"
    palm = PaLM(config.model)
    load_decoder(palm, path)
    sampling = sampling_of(config.rollout, (EOS,))
    engine = GenerationEngine(
        palm.eval().requires_grad_(False), eos_ids=(EOS,), sampling=sampling, max_tokens=8
    )
    asked = requests([3, 9, 1, 17, 5, 2, 8, 4], copies=2)
    reference = ReferencePolicy(config.model, path, sampling)
    made = sampled_trajectories(engine, asked, reference, scores, away)
    return to_table(made, ScoredTrajectory)


def learn(gang: LearnerGang, config: RunConfig, table: pa.Table) -> dict[str, float]:
    gang.begin_train(config)
    return gang.policy_phase(0, None, [table])


def recipe(workspace: RunConfig, folder: Path, precision: str = "fp32", **train: Any) -> RunConfig:
    settings = {"ppg": None, "samples_per_prompt": 2, "missing_eos_penalty": None, "minibatches": 1}
    return run_copy(
        workspace,
        folder,
        learner={"ranks": 1, "zero_stage": 0, "precision": precision},
        train=settings | train,
    )


@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.9}, {"top_k": 4, "temperature": 0.7}, {"min_p": 0.2, "min_response_tokens": 3}],
)
def test_equal_policies_are_no_nats_apart_whatever_filters(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, filters: dict[str, Any]
) -> None:
    config = recipe(workspace, tmp_path)
    rollout = config.rollout.model_copy(update=filters)
    config = config.model_copy(update={"rollout": rollout})
    found = learn(gang, config, batch(config, [0.3, -1.0, 0.8]))
    assert found["kl"] == pytest.approx(0.0, abs=1e-4), "of whole distributions"
    assert found["ratio_deviation"] < 1e-4, "of the distribution that was sampled from"
    assert found["mismatch_kl"] < 1e-8
    assert found["mismatch_ratio"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    "algorithm", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
)
def test_equal_scores_move_nothing(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, algorithm: str
) -> None:
    """Also where log-probabilities carry the noise of bf16: its normalised gradient was 0.7."""
    for precision, coef, most in (("fp32", 0.0, 0.0), ("fp32", 0.1, 1e-5), ("bf16", 0.1, 0.05)):
        folder = tmp_path / f"{precision}{coef}"
        config = recipe(workspace, folder, precision, algorithm=algorithm, kl_coef=coef)
        found = learn(gang, config, batch(config, [1.0]))
        assert found["gradient_norm"] <= most, (precision, coef)


GSPO = {"ratio": "sequence", "aggregation": "sequences", "clip_high": 4e-4}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "gspo": {"algorithm": "grpo", "objective": GSPO, "clip_range": 3e-4},
    "cispo": {"algorithm": "grpo", "objective": {"clip": "weight", "clip_high": 0.3}},
    "dapo": {
        "algorithm": "grpo",
        "objective": {"clip_high": 0.28, "dual_clip": 3.0, "overlong": {"buffer": 4}},
    },
    "dr_grpo": {"algorithm": "dr_grpo", "objective": {"aggregation": "constant"}},
    "k2": {"algorithm": "rloo", "objective": {"kl_loss": {"coef": 0.1, "estimator": "k2"}}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_whatever_filters(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, name: str
) -> None:
    config = recipe(workspace, tmp_path, kl_coef=0.0, e_pi=2, **OBJECTIVES[name])
    rollout = config.rollout.model_copy(update={"top_p": 0.9})
    config = config.model_copy(update={"rollout": rollout})
    found = learn(gang, config, batch(config, [0.3, -1.0, 0.8]))
    assert 0.0 < found["gradient_norm"] < 10.0
    assert found["ratio_deviation"] < 1e-4
    assert found["policy_steps"] == 2


def test_while_values_warm_up_the_policy_stays(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = recipe(workspace, tmp_path, samples_per_prompt=1, value_warmup=1, value_lambda=1.0)
    found = learn(gang, config, batch(config, [0.3, -1.0, 0.8]))
    assert found["value_loss"] > 0.0
    assert "policy_loss" not in found
    later = gang.policy_phase(1, None, [batch(config, [0.3, -1.0, 0.8])])
    assert later["ratio_deviation"] < 1e-4, "the weights that sampled are those that learn"
    assert later["policy_steps"] >= 1


def test_a_mismatch_is_measured_always_and_corrected_where_precisions_differ(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Probabilities at sampling were half of the learner's: weights of 2, or of the cap."""
    norms = {}
    for precision in ("fp32", "bf16"):
        for cap in (1.0, 1.5, 8.0):
            config = recipe(
                workspace,
                tmp_path / f"{precision}{cap}",
                precision,
                algorithm="reinforce_pp",
                behavior_cap=cap,
                kl_coef=0.0,
            )
            found = learn(gang, config, batch(config, [0.0, 1.0, 3.0], away=-0.6931))
            norms[precision, cap] = found["gradient_norm"]
            assert found["mismatch_ratio"] == pytest.approx(2.0, rel=0.1)
            assert found["mismatch_kl"] == pytest.approx(2.0 - 1.0 - 0.6931, rel=0.1)
    assert norms["fp32", 1.0] == norms["fp32", 1.5] == norms["fp32", 8.0], "nothing to correct"
    assert norms["bf16", 1.5] == pytest.approx(1.5 * norms["bf16", 1.0], rel=0.05)
    assert norms["bf16", 8.0] == pytest.approx(2.0 * norms["bf16", 1.0], rel=0.05)


def test_a_shared_value_head_leaves_the_policy_its_gradient_whatever_the_scores_scale(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Scores ten times as large made a gradient ten times as large, all of it the value's."""
    norms = []
    for scale in (1e3, 1e4):
        folder = tmp_path / f"{scale}"
        config = recipe(workspace, folder, value_network="shared", kl_coef=0.0)
        scores = [scale * x for x in (0.3, -1.0, 0.8)]
        norms.append(learn(gang, config, batch(config, scores))["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
