"""A critic of another size and family than the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from common.config.run import RunConfig
from deploy.workers.gang import LearnerGang
from tests.common.models.pretrained.tiny import reference, saved
from tests.learner.test_pretrained_training import LORA, SHAPE, run_of
from tests.scored import trajectories

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize(("ranks", "zero", "lora"), [(1, 0, None), (2, 3, None), (2, 2, LORA)])
def test_a_critic_of_another_family_learns_values(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    tmp_path: Path,
    ranks: int,
    zero: int,
    lora: dict[str, object] | None,
) -> None:
    policy = saved(reference("llama-tied", **SHAPE), tmp_path / "policy")
    critic = saved(reference("qwen3", vocab_size=311), tmp_path / "critic")
    adapters = lora and {**lora, "targets": ["all-linear"]}
    config = run_of(workspace, tmp_path, policy, zero=zero, lora=adapters, value_lr=1e-2)
    model = {"start": str(critic), "context": 64, "vocab_size": 300}
    values = config.model_dump(mode="json")
    config = RunConfig.model_validate({**values, "train": values["train"] | {"critic": model}})
    gang, losses = gangs[ranks], []
    gang.begin_train(config)
    for iteration in range(4):
        tables = [ray.put(t) for t in trajectories(adapter=config.train.adapter)]
        losses.append(gang.policy_phase(iteration, None, tables)["value_loss"])
    assert losses[-1] < losses[0]
