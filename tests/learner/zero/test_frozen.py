"""The frozen policy of an auxiliary phase: what a rank keeps of it under ZeRO 3. Real Ray gangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
import torch

import learner.zero.frozen
from common.config.model import LoraConfig
from common.config.run import RunConfig
from common.models.adapters import adapter_size
from common.models.build import build_policy
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner.objectives.auxiliary import frozen_policy
from learner.objectives.clone_kl import ClonedFrom
from learner.rank import LearnerRank
from tests.learner.zero.test_engine import storages
from tests.workspaces import run_copy, write_networks

WIDTH, ROWS = 128, 64
"""Of the output head, and what is gathered of it at a time."""
pytestmark = pytest.mark.usefixtures("cluster")


def frozen(rank: LearnerRank) -> tuple[int, int, float, float]:
    """Bytes that a frozen policy takes; the most of its head that is whole at a time; how far its
    states and its KL are from what they should be."""
    engine, model = rank.learner.policy, rank.learner.config.model
    # Ranks read different numbers of positions, and one of them none.
    tokens = torch.arange(2, 24)[None] if rank.rank else torch.arange(3, 5)[None]
    predict = torch.arange(tokens.shape[1])[None] if rank.rank else torch.full((1, 2), -1)
    before = storages()
    few = mock.patch.object(learner.zero.frozen, "_GATHERED", ROWS * WIDTH)
    with few, frozen_policy(engine, model) as old:
        held = sum(size for address, size in storages().items() if address not in before)
        with torch.no_grad():
            states, _ = old.run(tokens, predict_BR=predict, states=True)
            most = 0 if old.head is None else max(len(rows) for rows, _ in old.head())
        read = ClonedFrom(states.flatten(0, 1), old.head)
        kl, values = engine(tokens, predict_BR=predict, read=read)
        engine.backward(kl.sum() + values.sum(), last=True)
        with torch.no_grad():
            again, _ = old.run(tokens, predict_BR=predict, states=True)
    return held, most, float(kl.abs().max()), float((again - states).abs().max())


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapters"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_keeps_its_share_of_the_frozen_policy(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    tmp_path: Path,
    precision: str,
    lora: dict[str, Any] | None,
) -> None:
    config = run_copy(
        workspace,
        tmp_path,
        model={"dim": WIDTH, "heads": 4, "head_dim": 32, "layers": 4},
        learner={"zero_stage": 3, "precision": precision},
        train={"lora": lora},
    )
    write_networks(config)
    gangs[2].begin_train(config)
    found = ray.get([start_function(rank, frozen) for rank in gangs[2].ranks])
    network = build_policy(config.model)
    size = 4 if precision == "fp32" else 2
    whole = size * sum(p.numel() for p in network.parameters())
    share = whole / 2
    if lora is not None:
        share = 4 * adapter_size(network.decoder, LoraConfig.model_validate(lora))
    for held, most, kl, again in found:
        assert kl == again == 0.0
        assert 0.9 * share <= held <= 1.1 * share
        assert most == (0 if lora else ROWS)
