"""`talipot loop`: rounds one after the other, each of its steps killed once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.models.build import build_policy
from common.models.weight_files import save_weights
from common.run_folder import RunFolder
from deploy.feedback.loop import base_of, require_runnable, waits_for
from deploy.feedback.rounds import (
    close_round,
    end_round,
    export_round,
    is_closed,
    make_round,
    round_of,
)
from deploy.feedback.store import Store
from deploy.run_folder.progress import record
from tests.deploy.feedback.labelers import Simulated, at_work
from tests.deploy.feedback.rounds import plain, round_in
from tests.deploy.feedback.test_propose import settings
from tests.workspaces import run_copy

ROOT = Path(__file__).parents[3]


def trained(workspace: RunConfig, folder: Path) -> RunConfig:
    """A run whose policy was trained, as far as its folder says."""
    config = run_copy(
        workspace,
        folder,
        rollout={"stop": ["a", "e", "i", "o", "t"], "max_response_tokens": 24, "actors": 1},
        learner={"cpus_per_rank": 0.5},
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


def test_a_round_that_nobody_here_can_finish_is_told(tmp_path: Path) -> None:
    folder = round_in(tmp_path, plain(3), overlap=2, overlap_share=1.0)
    assert waits_for(folder) == "answers", "nobody has come yet"
    store = Store(folder.answers)
    for name in ("ann", "bob"):
        store.welcome(name)
        while (task := store.next_task(name)) is not None:
            step = None if name == "bob" and task.pair_uid == plain(3)[1].uid else 1
            store.submit(name, task.key, step=step, why="broken")
        assert (
            waits_for(folder) == "others"
        )  # first of the second person's, then of the skipped one
    store.welcome("cid")
    assert waits_for(folder) == "answers"
    assert store.next_task("cid") is not None
    assert waits_for(folder) == "answers", "it is being read"
    store.close()
    close_round(folder)
    assert waits_for(folder) == "nothing"


def test_an_empty_round_stays_open(tmp_path: Path) -> None:
    folder = round_in(tmp_path, plain(3))
    with pytest.raises(ConfigError, match="nothing is answered yet"):
        end_round(folder, settings())
    assert not is_closed(folder) and not folder.comparisons.exists()


def test_what_training_would_refuse_is_refused_before_people_are_asked(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = trained(workspace, tmp_path)
    require_runnable(base_of(config).config)
    greedy = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"temperature": 0.0})}
    )
    with pytest.raises(ConfigError, match="nothing to learn from"):
        require_runnable(greedy)
    no_data = config.model_copy(
        update={"data": config.data.model_copy(update={"demonstrations": ()})}
    )
    with pytest.raises(ConfigError, match=r"data\.demonstrations is empty"):
        require_runnable(no_data)


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


def moments(config: RunConfig) -> dict[str, Callable[[], bool]]:
    """When a loop of two rounds is killed: by what each step has written then."""
    base = base_of(config)
    first, second = (base.run_of(number).folder for number in (1, 2))

    def answered(number: int, least: int) -> bool:
        folder = config.folder.round(number)
        if not folder.path.exists() or is_closed(folder):
            return False
        store = Store(folder.answers)
        count = len(store.standing())
        store.close()
        return count >= least

    def logged(folder: RunFolder, stage: str) -> bool:
        return folder.metrics.exists() and f'"{stage}"' in folder.metrics.read_text()

    return {
        "while pairs are chosen": lambda: (config.run_dir / "feedback").exists(),
        "while people answer": lambda: answered(1, 4),
        "while the reward model learns": lambda: logged(first, "reward"),
        "after a checkpoint of the policy": first.checkpoint(1).exists,
        "in the second round": lambda: answered(2, 2),
        "while the second reward model learns": lambda: logged(second, "reward"),
        "while the second policy learns": lambda: logged(second, "train"),
    }


def fingerprints(config: RunConfig, rounds: int) -> list[object]:
    """What a loop leaves, without times, and without who was asked, which follows from them."""
    drawn = ("uid", "labeler", "seconds")
    base = base_of(config)
    found: list[object] = []
    for number in range(1, rounds + 1):
        text = config.folder.round(number).comparisons.read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        found.append([{k: v for k, v in row.items() if k not in drawn} for row in rows])
        found.append(json.loads(base.run_of(number).folder.result.read_text())["weights_hash"])
    return found


def people(config: RunConfig) -> list[Simulated]:
    """Three who prefer what is longer."""
    return [
        Simulated(run=config.run_dir, name=name, quality=lambda _, text: len(text))
        for name in ("ann", "bob", "cid")
    ]


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_loop_that_is_killed_in_each_step_comes_to_the_same_end(
    workspace: RunConfig, tmp_path: Path
) -> None:
    found = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        config = trained(workspace, tmp_path / name)
        log = tmp_path / f"{name}.log"
        left = moments(config) if name == "killed" else {}
        with at_work(people(config)):
            while True:
                running = looped(config, 2, log)
                while running.poll() is None:
                    time.sleep(0.05)
                    come = next((name for name, has_come in left.items() if has_come()), None)
                    if come is not None:
                        os.killpg(running.pid, signal.SIGKILL)
                        del left[come]
                        running.wait()
                        time.sleep(3.0)  # what was killed gives its lock and its ports back
                        break
                else:
                    assert running.returncode == 0, log.read_text()[-3000:]
                    break
        assert not left, f"never killed: {list(left)}"
        found.append(fingerprints(config, 2))
    assert found[0] == found[1]
