"""`talipot loop`: rounds one after the other, each of its steps killed once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.models.build import build_policy
from common.models.weight_files import save_weights
from deploy.feedback.loop import base_of, waits_for
from deploy.feedback.rounds import close_round, export_round, make_round, round_of
from deploy.feedback.store import Store
from deploy.run_folder.progress import record
from tests.conftest import run_copy
from tests.deploy.feedback.labelers import Simulated, at_work
from tests.deploy.feedback.rounds import plain
from tests.deploy.feedback.test_propose import settings

ROOT = Path(__file__).parents[3]
STEPS = ("choosing pairs", "asking people", "training the reward model", "training the policy")


def trained(workspace: RunConfig, folder: Path) -> RunConfig:
    """A run whose policy was trained, as far as its folder says."""
    config = run_copy(
        workspace,
        folder,
        rollout={"stop": ["a", "e", "i", "o", "t"], "max_response_tokens": 24},
        reward_model={"epochs": 1, "batch_size": 16},
        train={"iterations": 2, "checkpoint_every": 1},
    )
    policy = build_policy(config.model)
    policy.initialise(9)
    config.folder.policy.path.mkdir()
    save_weights(policy.state_dict(), config.folder.policy.weights, {})
    save_config(config, config.folder.config)
    record(config.run_dir, {"iterations": config.train.iterations, "finished": True})
    return config


def test_a_step_is_known_by_what_it_leaves(workspace: RunConfig, tmp_path: Path) -> None:
    config = trained(workspace, tmp_path)
    base = base_of(config)
    assert base.run_of(0) == config
    assert base.next_step(1) == "propose"
    folder = make_round(config.folder, settings(overlap_share=0.0), plain(4))
    assert base.next_step(1) == "ask" and waits_for(folder) == "answers"
    store = Store(folder.answers)
    store.welcome("ann")
    while (task := store.next_task("ann")) is not None:
        store.submit("ann", task.key, step=1)
    store.close()
    assert waits_for(folder) == "nothing" and base.next_step(1) == "ask", "it is not closed yet"
    close_round(folder)
    assert base.next_step(1) == "ask", "its comparisons are not written yet"
    assert export_round(folder, round_of(config.folder, 1)[1]) == 4
    assert base.next_step(1) == "reward"
    run = base.run_of(1)
    assert run.name == f"{config.name}-round-001" and run.output == config.output
    assert run.data.comparisons == (*config.data.comparisons, str(folder.comparisons))
    assert run.reuse.sft == str(config.folder.sft.path) and run.reuse.reward_model is None
    weights = run.folder.reward_model.weights
    weights.parent.mkdir(parents=True)
    shutil.copy(config.folder.reward_model.weights, weights)
    assert base.next_step(1) == "reward", "one of several seeds is not all of them"
    line = {"stage": "reward", "step": 3, "time": 1.0, "metrics": {"loss": 0.1, "epochs": 1.0}}
    run.folder.metrics.write_text(json.dumps(line) + "\n")
    assert base.next_step(1) == "train"
    record(run.run_dir, {"iterations": 2, "finished": True})
    assert base.next_step(1) is None
    assert base.run_of(2).data.comparisons[-1].endswith("round-002/comparisons.jsonl")


def test_a_run_without_a_policy_or_a_reward_model_is_no_base(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = trained(workspace, tmp_path)
    config.folder.result.unlink()
    with pytest.raises(ConfigError, match="has no trained policy to ask about yet"):
        base_of(config)
    components = {"length": {"kind": "function", "target": "tests.rewards:length"}}
    (tmp_path / "other").mkdir()
    other = run_copy(workspace, tmp_path / "other", reward_service={"components": components})
    with pytest.raises(ConfigError, match="no component of kind model"):
        base_of(other)


def looped(config: RunConfig, rounds: int, log: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    command = ["loop", str(config.run_dir), "--rounds", str(rounds), "--pairs", "12"]
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *command, "--as", "ann", "--repeat-share", "0"],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        start_new_session=True,
    )


def fingerprints(config: RunConfig, rounds: int) -> list[object]:
    """What a loop leaves, without times."""
    base = base_of(config)
    found: list[object] = []
    for number in range(1, rounds + 1):
        text = config.folder.round(number).comparisons.read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        found.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
        found.append(json.loads(base.run_of(number).folder.result.read_text())["policy_sha256"])
    return found


def people(config: RunConfig) -> list[Simulated]:
    """Three, who like letters e, and are wrong now and then."""
    return [
        Simulated(run=config.run_dir, name=name, quality=lambda _, text: text.count("e"), noise=0.1)
        for name in ("ann", "bob", "cid")
    ]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_loop_that_is_killed_in_each_step_comes_to_the_same_end(
    workspace: RunConfig, tmp_path: Path
) -> None:
    found = []
    for name, kills in (("whole", ()), ("killed", STEPS)):
        (tmp_path / name).mkdir()
        config = trained(workspace, tmp_path / name)
        log = tmp_path / f"{name}.log"
        left = list(kills)
        with at_work(people(config)):
            while True:
                before = log.stat().st_size if log.exists() else 0
                running = looped(config, 2, log)
                while running.poll() is None:
                    time.sleep(0.05)
                    if left and left[0].encode() in log.read_bytes()[before:]:
                        time.sleep(1.5)
                        os.killpg(running.pid, signal.SIGKILL)
                        left.pop(0)
                        running.wait()
                        time.sleep(3.0)  # what was killed gives its lock and its ports back
                        break
                else:
                    assert running.returncode == 0, log.read_text()[-3000:]
                    break
        assert not left, f"never killed at: {left}"
        found.append(fingerprints(config, 2))
    assert found[0] == found[1]
