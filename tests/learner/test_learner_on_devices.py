"""The learner on a card, pretended: all of it is there, and no micro-batch is waited for.

What it computes is what it computes on the processor: the same code, which other tests hold to
references, and `tests.gpu` on a card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.run import RunConfig
from common.wire.weights import digest
from learner import actor_critic
from learner.learner import Learner
from learner.objectives.policy import PolicyObjective
from learner.optimisation import Loss
from learner.supervised import stage
from learner.supervised.reward_model import RewardModelStage
from learner.supervised.sft import SftStage
from learner.zero import publisher
from tests.common.models.pretrained.tiny import reference, saved
from tests.learner.test_sharding import preferences, sft_data
from tests.plain_engine import plain
from tests.pretended import DEVICE, Card
from tests.scored import trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("one_rank")

GATHERED = "learner/batch/shards.py:gather"
SUMMED = "learner/optimisation.py:over_ranks"
NORM = "learner/optimisation.py:optimise"
"""Of the gradient, where the engine steps."""
SHARED = {"value_network": "shared", "ppg": None}
OBJECTIVE = {"kl_loss": {"coef": 0.1}, "aggregation": "sequences", "ratio": "sequence"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "values apart, and an auxiliary phase": {},
    "adapters": {"train": {"lora": {"rank": 2}}},
    "one network, and every term": {
        "train": {**SHARED, "entropy_coef": 0.01, "objective": OBJECTIVE, "max_staleness": 1},
        "rollout": {"top_p": 0.9, "top_k": 50, "temperature": 0.7},
    },
    "bf16": {"learner": {"precision": "bf16"}},
}
MODELS = ["palm", "qwen3", "gemma2"]


def run_of(
    workspace: RunConfig, folder: Path, model: str, budget: int, changes: dict[str, dict[str, Any]]
) -> RunConfig:
    """A run with a model of this kind, and micro-batches of so many tokens."""
    learner = {"ranks": 1, "zero_stage": 0, "micro_batch_tokens": budget}
    sections = {**changes, "learner": {**learner, **changes.get("learner", {})}}
    if model == "palm":
        return run_copy(workspace, folder / "run", **sections)
    length = {"components": {"length": {"kind": "function", "target": "a:b"}}}
    config = run_copy(workspace, folder / "run", reward_service=length, **sections)
    values = config.model_dump(mode="json")
    checkpoint = saved(reference(model, vocab_size=320), folder / "checkpoint")
    values["model"] = {"start": str(checkpoint), "context": 64, "vocab_size": 300}
    return RunConfig.model_validate(values)


def learner_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Learner:
    monkeypatch.setattr(actor_critic, "ZeroEngine", plain(DEVICE))
    start = config.run_dir / "sft" / "policy.safetensors"
    policy = Path(getattr(config.model, "start", start))
    reward = config.run_dir / "reward_model" / "reward.safetensors"
    needed = config.reward_service.needs_model and config.train.separate_values
    return Learner(config, policy, reward if needed else None, (0,))


def waits_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Card, list[str]]:
    """Train: a policy phase, an auxiliary one where there is one, and a publication."""
    learner = learner_of(config, monkeypatch)
    waited: list[str] = []
    monkeypatch.setattr(publisher, "wait_for", lambda device: waited.append(device.type))
    made = trajectories(6, adapter=config.train.adapter)
    with Card() as card:
        learner.policy_phase(made, 0)
        if config.train.ppg is not None:
            learner.auxiliary_phase(0)
        facts, payload = learner.networks.publish()
    assert facts.slice.digest == digest(payload)
    assert facts.slice.length == facts.total > 0
    assert card.products > 0
    return card, waited


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_phases_wait_for_steps_and_for_no_micro_batch(
    workspace: RunConfig,
    tmp_path: Path,
    model: str,
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Counter[str]] = []
    products: list[int] = []
    for budget in (4096, 40):
        folder = tmp_path / str(budget)
        folder.mkdir()
        config = run_of(workspace, folder, model, budget, VARIANTS[variant])
        card, waited = waits_of(config, monkeypatch)
        assert waited == [DEVICE], "once for all that is published"
        assert set(card.reads) == {"learner/zero/publisher.py:_read_back"}
        found.append(card.waits)
        products.append(card.products)
    few, many = found
    assert products[1] > 1.5 * products[0], "there were more micro-batches"
    networks = 1 + config.train.separate_values
    steps = networks * config.train.minibatches
    if config.train.ppg is not None:
        steps += networks * config.train.ppg.minibatches
    assert few == many == {GATHERED: networks, SUMMED: steps, NORM: steps}


@pytest.mark.parametrize("model", MODELS)
def test_supervised_stages_wait_for_steps_and_evaluations(
    workspace: RunConfig, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ZeroEngine", plain(DEVICE))
    sections = {"sft": {"batch_tokens": 512}, "reward_model": {"batch_size": 16}}
    config = run_of(workspace, tmp_path, model, 200, sections)
    data = sft_data(config)
    sft = SftStage(config, data, data[:6])
    start = Path(getattr(config.model, "start", config.run_dir / "sft" / "policy.safetensors"))
    reward = RewardModelStage(config, preferences(), preferences()[:6], [], start, 0)
    for trained in (sft, reward):
        steps = min(2, trained.total_steps)
        with Card() as card:
            trained.advance(steps)
            trained.evaluate()
        assert card.waits == {SUMMED: steps + 1, "learner/supervised/stage.py:advance": steps}
        assert card.products > 0
    with Card() as card:
        reward.shift(data[:6])
    assert card.waits == {SUMMED: 1}


@pytest.mark.parametrize(
    "plant",
    [
        lambda total: total + torch.ones(3).sum() * torch.ones(1, 1),
        lambda total: total * total.detach().item(),
        lambda total: total if total > 0 else -total,
        lambda total: total + total.detach().cpu(),
    ],
    ids=["a tensor on the processor", "item", "truth", "a copy"],
)
def test_what_does_not_belong_on_a_card_is_found(
    workspace: RunConfig, tmp_path: Path, plant: Callable[[Any], Any], monkeypatch: Any
) -> None:
    whole = PolicyObjective.loss

    def planted(self: PolicyObjective, *args: Any) -> Loss:
        loss = whole(self, *args)
        return Loss(plant(loss.total), loss.sums)

    monkeypatch.setattr(PolicyObjective, "loss", planted)
    config = run_of(workspace, tmp_path, "palm", 40, {})
    try:
        card, _ = waits_of(config, monkeypatch)
    except (AssertionError, RuntimeError, NotImplementedError):
        return
    assert set(card.waits) > {GATHERED, SUMMED, NORM}, "it waited where nobody waits"
