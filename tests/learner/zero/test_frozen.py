"""The frozen policy of an auxiliary phase: what a rank keeps of it under ZeRO 3. Real Ray gangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from common.config.model import LoraConfig
from common.config.run import RunConfig
from common.models.adapters import adapter_size
from common.models.build import build_policy
from common.models.embedding import output_head
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner.objectives.auxiliary import frozen_policy
from learner.rank import LearnerRank
from tests.learner.zero.test_engine import storages
from tests.workspaces import run_copy, write_networks

pytestmark = pytest.mark.usefixtures("cluster")


def frozen(rank: LearnerRank) -> tuple[int, float, float]:
    """Bytes that a frozen policy takes, and how far its states and logits are from the policy's."""
    engine, model = rank.learner.policy, rank.learner.config.model
    tokens = torch.arange(2, 24)[None] + 3 * rank.rank
    before = storages()
    with frozen_policy(engine, model) as old, torch.no_grad():
        held = sum(size for address, size in storages().items() if address not in before)
        ours, _ = engine(tokens)
        states, _ = old.run(tokens, states=True)
        theirs = old.logits(states)
        for position in range(10 + rank.rank):  # pieces are read in different numbers
            old.logits(states[0, position])
        again, _ = old.run(tokens, states=True)
    off = (theirs - ours).abs().max(), (again - states).abs().max()
    return held, float(off[0]), float(off[1])


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapters"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_keeps_its_share_of_the_frozen_policy_and_the_head(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    tmp_path: Path,
    precision: str,
    lora: dict[str, Any] | None,
) -> None:
    config = run_copy(
        workspace,
        tmp_path,
        model={"dim": 128, "heads": 4, "head_dim": 32, "layers": 4},
        learner={"zero_stage": 3, "precision": precision},
        train={"lora": lora},
    )
    write_networks(config)
    gangs[2].begin_train(config)
    found = ray.get([start_function(rank, frozen) for rank in gangs[2].ranks])
    network = build_policy(config.model)
    size = 4 if precision == "fp32" else 2
    head = size * sum(p.numel() for p in output_head(network.decoder).parameters(recurse=False))
    whole = size * sum(p.numel() for p in network.parameters())
    most = head + (whole - head) / 2
    if lora is not None:
        most = head + 4 * adapter_size(network.decoder, LoraConfig.model_validate(lora))
    for held, off, again in found:
        assert off == again == 0.0
        assert 0.9 * most <= held <= 1.1 * most < 0.8 * whole
