"""A run whose critic is half as wide as the policy and whose reward model is of another family."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.stages.session import open_session
from deploy.stages.supervised import run_reward
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.chat_runs import make_chat_workspace, smollm2
from tests.common.data.tokenizers import byte_level
from tests.common.models.pretrained.tiny import reference, saved
from tests.deploy.control.runs import finish

pytestmark = pytest.mark.usefixtures("cluster")


def judge(folder: Path) -> Path:
    """A Qwen with a tokenizer of its own."""
    byte_level(folder)
    size = load_tokenizer(folder).vocab_size + 7
    return saved(reference("qwen3", vocab_size=size, max_position_embeddings=256), folder)


def comparisons(folder: Path) -> Path:
    """The better answer has more of the letter that is asked for."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Write 'e' often, and of map {i}."}],
            "chosen": [{"role": "assistant", "content": "ee" * (1 + i % 3)}],
            "rejected": [{"role": "assistant", "content": "xy" * (1 + i % 3)}],
        }
        for i in range(120)
    ]
    path = folder / "comparisons.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def demonstrations(folder: Path) -> Path:
    """What the reward model is centred on."""
    row = {
        "messages": [{"role": "user", "content": "Of maps."}, {"role": "assistant", "content": "e"}]
    }
    path = folder / "demonstrations.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4, encoding="utf8")
    return path


def test_they_are_trained_and_serve(tmp_path: Path, gang: LearnerGang) -> None:
    base = make_chat_workspace(tmp_path, head_dim=8)
    wide = json.loads((tmp_path / "start" / "config.json").read_text())["hidden_size"]
    critic = smollm2(tmp_path / "critic", head_dim=4)
    half = json.loads((critic / "config.json").read_text())["hidden_size"]
    assert wide == 2 * half
    values: dict[str, Any] = base.model_dump(mode="json")
    values["data"] |= {
        "comparisons": [str(comparisons(tmp_path))],
        "demonstrations": [str(demonstrations(tmp_path))],
    }
    own = {"start": str(judge(tmp_path / "judge")), "context": 128}
    values["reward_model"] |= {"model": own, "lr": 3e-3, "batch_size": 16, "epochs": 2.0}
    values["reward_service"]["components"] = {"judge": {"kind": "model"}}
    values["train"] |= {"lora": None, "iterations": 2, "value_lr": 1e-2}
    values["train"]["critic"] = {"start": str(critic), "context": 96}
    config = RunConfig.model_validate(values)
    with open_session(config, Console(file=io.StringIO(), width=200), writer="reward") as session:
        metrics = run_reward(session, config)
        config = session.config
    assert metrics["accuracy_heldout"] > 0.9
    facts = finish(config, gang)
    assert facts["rollouts_trained"] == 32
    rows = from_table(read_log(config.run_dir, 1)[0], ScoredTrajectory)
    assert len({row.score for row in rows}) > 10, "the reward model tells responses apart"
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["metrics"].get("value_loss") for line in lines]
    assert len([loss for loss in losses if loss is not None]) == 2
