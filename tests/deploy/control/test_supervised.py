"""Looking at held-out data while a supervised stage trains changes nothing that is trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config.run import RunConfig
from deploy.run_folder.log_lines import read_lines
from deploy.stages.session import Session
from deploy.stages.supervised import run_reward, run_sft
from deploy.workers.gang import LearnerGang
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize(
    ("run", "section", "size", "weights"),
    [
        (run_sft, "sft", {"batch_tokens": 256}, "sft/policy.safetensors"),
        (run_reward, "reward_model", {"batch_size": 16}, "reward_model/reward.safetensors"),
    ],
)
def test_held_out_data_is_looked_at_now_and_then(
    workspace: RunConfig,
    gang: LearnerGang,
    tmp_path: Path,
    run: Callable[[Session, RunConfig], dict[str, float]],
    section: str,
    size: dict[str, Any],
    weights: str,
) -> None:
    left, logged = [], []
    for every in (0, 2):
        changed = {section: size | {"evaluate_every": every}}
        config = run_copy(workspace, tmp_path / str(every), **changed)
        session = Session(config, Console(file=io.StringIO()))
        session._gang = gang
        found = run(session, config)
        session.unlock()
        left.append((config.run_dir / weights).read_bytes())
        lines = read_lines(config.folder.metrics).lines
        steps = [line.step for line in lines if "heldout_loss" in line.metrics]
        logged.append(steps)
        total = lines[-1].step
        assert lines[-1].metrics["heldout_loss"] == found["heldout_loss"]
    assert left[0] == left[1]
    assert logged == [[total], [*range(2, total, 2), total]]
    assert total > 4
