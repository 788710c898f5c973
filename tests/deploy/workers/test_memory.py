"""Whether a stage fits into this machine, by hand-counted bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import out_of_memory
from common.config.run import RunConfig
from common.errors import ClusterError
from common.models.pretrained.checkpoint import Checkpoint
from deploy.workers.memory import require_room
from tests.common.models.pretrained.checkpoints import random_checkpoint

FUNCTION = {"components": {"length": {"kind": "function", "target": "a:b"}}}
ONE = {"ranks": 1, "zero_stage": 0}


def run_of(path: Path, **sections: Any) -> RunConfig:
    model = {"start": str(path), "context": 64}
    values = {"model": model, "learner": ONE, "reward_service": FUNCTION, **sections}
    return RunConfig.model_validate(values)


def least(monkeypatch: pytest.MonkeyPatch, config: RunConfig, stage: str) -> int:
    """The fewest bytes free with which a stage may begin, by bisection."""
    low, high = 0, 1 << 34
    while low < high:
        middle = (low + high) // 2
        monkeypatch.setattr(out_of_memory, "available_bytes", lambda free=middle: free)
        try:
            require_room(config, stage)
            high = middle
        except ClusterError:
            low = middle + 1
    return low


def test_bytes_of_each_role_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = random_checkpoint(tmp_path / "model")
    size = Checkpoint.open(path).parameters
    assert least(monkeypatch, run_of(path), "sft") == 16 * size
    grpo = {"algorithm": "grpo", "samples_per_prompt": 2, "ppg": None}
    train = run_of(path, train=grpo, rollout={"actors": 3, "precision": "bf16"})
    assert least(monkeypatch, train, "train") == 16 * size + 3 * 2 * size + 4 * size
    ppo = run_of(path, train={"ppg": None}, rollout={"actors": 1})
    assert least(monkeypatch, ppo, "train") == 2 * 16 * size + 4 * size + 4 * size
    lora = run_of(path, sft={"lora": {"rank": 2}, "precision": "bf16"})
    assert 2 * size < least(monkeypatch, lora, "sft") < 4 * size


def test_the_number_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = random_checkpoint(tmp_path / "model")
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda: 2**20)
    words = r"train \(learner .*, rollout actors .*, reward workers .* MiB\) takes .* and 1.0 MiB"
    with pytest.raises(ClusterError, match=words):
        require_room(run_of(path), "train")
    elsewhere = run_of(path, cluster={"address": "auto"})
    require_room(elsewhere, "train")  # its nodes' memory is not this machine's


def test_this_machine_says_how_much_is_free() -> None:
    free = out_of_memory.available_bytes()
    assert free is not None
    assert 2**20 < free < 2**50
