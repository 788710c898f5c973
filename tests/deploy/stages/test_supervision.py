"""Supervised stages whose ranks and commands die: the weights are those of an untroubled stage."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console
from safetensors.torch import load_file

from common.config.run import RunConfig
from common.errors import WorkerError
from common.run_folder import RunFolder
from deploy.run_folder.log_lines import read_lines
from deploy.stages import supervision
from deploy.stages.session import open_session
from deploy.stages.supervised import run_reward, run_sft
from deploy.stages.supervision import finished
from deploy.workers.gang import LearnerGang
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")

Trouble = Callable[[LearnerGang], None]
SFT = {"batch_tokens": 128, "epochs": 4.0, "checkpoint_every_s": 0.001}
REWARD = {"batch_size": 16, "epochs": 2.0, "seeds": 2, "keep_seeds": True}


def of(workspace: RunConfig, folder: Path, **sections: Any) -> RunConfig:
    folder.mkdir()
    made = {"sft": SFT, "reward_model": {**REWARD, "checkpoint_every_s": 0.001}}
    made |= {"learner": {"deadline_s": 60}}
    return run_copy(workspace, folder, **{**made, **sections})


def do(config: RunConfig, stage: str, trouble: Trouble = lambda _: None) -> tuple[Any, str]:
    """Run a stage as its command does; what it returns and prints. Trouble precedes advances."""
    advance, said = LearnerGang.advance, io.StringIO()

    def troubled(self: LearnerGang, steps: int, *, anew: bool) -> dict[str, float]:
        trouble(self)
        return advance(self, steps, anew=anew)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnerGang, "advance", troubled)
        console = Console(file=said, width=400)
        with open_session(config, console, writer=stage) as session:
            found = {"sft": run_sft, "reward": run_reward}[stage](session, config)
    return found, said.getvalue()


def at_call(number: int, what: Trouble) -> Trouble:
    """Trouble at one call only."""
    calls = 0

    def strike(gang: LearnerGang) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            what(gang)

    return strike


class SlowClock:
    """By which every call lasts a minute."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        self._now += 60.0
        return self._now


def but_the_clock(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in metrics.items() if name != "tokens_per_second"}


def lines(config: RunConfig, stage: str) -> dict[int, dict[str, float]]:
    """The log of a stage by its steps."""
    found = [line for line in read_lines(config.folder.metrics).lines if line.stage == stage]
    return {line.step: but_the_clock(line.metrics) for line in found}


def kill_rank(gang: LearnerGang) -> None:
    os.kill(ray.get(gang.ranks[1].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def interrupt(_: LearnerGang) -> None:
    raise KeyboardInterrupt


def weights(folder: RunFolder) -> dict[str, Any]:
    paths = [folder.sft.weights, *sorted(folder.path.glob("reward_*/**/*.safetensors"))]
    return {
        f"{path.relative_to(folder.path)} {name}": tensor
        for path in paths
        for name, tensor in load_file(path).items()
    }


def same(one: RunConfig, two: RunConfig) -> bool:
    ours, theirs = weights(one.folder), weights(two.folder)
    assert len(ours) > 10
    return ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def done(
    workspace: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, float]]:
    """A run with both stages, and what the first returned."""
    config = of(workspace, tmp_path_factory.mktemp("untroubled") / "x")
    metrics, _ = do(config, "sft")
    do(config, "reward")
    return config, metrics


@pytest.fixture(scope="module")
def untroubled(done: tuple[RunConfig, dict[str, float]]) -> RunConfig:
    return done[0]


def in_the_second_seed(config: RunConfig) -> Trouble:
    """Interrupt at the second call after the first reward model was done."""
    calls = 0

    def strike(gang: LearnerGang) -> None:
        nonlocal calls
        calls += (config.run_dir / "unfinished" / "reward" / "done.json").exists()
        if calls == 2:
            interrupt(gang)

    return strike


def test_a_rank_that_dies_changes_no_weight(
    workspace: RunConfig, untroubled: RunConfig, tmp_path: Path
) -> None:
    config = of(workspace, tmp_path / "x")
    _, said = do(config, "sft", at_call(3, kill_rank))
    assert "sft: learner-1 died in advance" in said and "it goes on with other ranks" in said
    assert "supervised policy: goes on after step " in said
    _, said = do(config, "reward", at_call(10, kill_rank))
    assert "it goes on with other ranks" in said
    assert same(config, untroubled)
    assert all(lines(config, stage) == lines(untroubled, stage) for stage in ("sft", "reward"))
    assert not (config.run_dir / "unfinished" / "sft").exists()
    events = [json.loads(line) for line in config.folder.events.read_text().splitlines()]
    assert [event["what"] for event in events].count("learner restarted") == 2


def test_a_command_that_dies_is_given_again(
    workspace: RunConfig, untroubled: RunConfig, tmp_path: Path
) -> None:
    """Between two lines of the log; the reward model in its second seed: the first is not trained
    again.
    """
    config = of(workspace, tmp_path / "x")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervision, "time", SlowClock())
        patch.setattr(supervision, "_AT_FIRST", 1)
        do(config, "sft", at_call(6, interrupt))
    assert (config.run_dir / "unfinished" / "sft").exists()
    metrics, said = do(config, "sft")
    assert "supervised policy: goes on after step 5" in said
    whole, ours = lines(untroubled, "sft"), lines(config, "sft")
    assert len(whole) >= 20 and 3 in whole and not {1, 2, 4, 5} & whole.keys()
    assert ours == whole
    first = next(line for line in read_lines(config.folder.metrics).lines if line.stage == "sft")
    assert first.metrics["tokens_per_second"] == 128 / 60, "three steps, three calls of a minute"
    assert but_the_clock(metrics) == whole[max(whole)]

    with pytest.raises(KeyboardInterrupt):
        do(config, "reward", in_the_second_seed(config))
    _, said = do(config, "reward")
    assert "reward model 1" not in said and "reward model 2: goes on after step " in said
    assert same(config, untroubled)
    assert not list((config.run_dir / "unfinished").iterdir())


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.chaos), pytest.param(1, marks=pytest.mark.chaos), 3]
)
def test_adafactor_goes_on_too(workspace: RunConfig, tmp_path: Path, stage: int) -> None:
    learner = {"deadline_s": 60, "zero_stage": stage}
    found = []
    for name in ("whole", "killed"):
        config = of(
            workspace,
            tmp_path / name,
            sft={**SFT, "optimizer": "adafactor", "lr": 0.05},
            learner=learner,
        )
        do(config, "sft", at_call(3, kill_rank) if name == "killed" else lambda _: None)
        found.append(load_file(config.folder.sft.weights))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


def test_a_checkpoint_of_other_settings_is_not_taken(
    workspace: RunConfig, untroubled: RunConfig, tmp_path: Path
) -> None:
    config = of(workspace, tmp_path / "x")
    other = config.model_copy(update={"sft": config.sft.model_copy(update={"lr": 1e-3})})
    with pytest.raises(KeyboardInterrupt):
        do(other, "sft", at_call(4, interrupt))
    _, said = do(config, "sft")
    assert "supervised policy: starts again from step 0: the checkpoint of step " in said
    assert "was made with another sft.lr" in said
    ours, theirs = (load_file(c.folder.sft.weights) for c in (config, untroubled))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.chaos
def test_ranks_that_die_again_and_again_end_the_stage(workspace: RunConfig, tmp_path: Path) -> None:
    config = of(workspace, tmp_path / "x", learner={"deadline_s": 60, "max_restarts": 1})
    with pytest.raises(
        WorkerError, match=r"learner-1 died in advance.*restarted 1 times.*--resume"
    ):
        do(config, "sft", kill_rank)


def test_a_damaged_checkpoint_is_told_and_left(workspace: RunConfig, tmp_path: Path) -> None:
    config = of(workspace, tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        do(config, "sft", at_call(4, interrupt))
    (state,) = config.run_dir.glob("unfinished/sft/checkpoints/*/state.json")
    told = json.loads(state.read_text())
    assert 0 < told["seconds"] < 600 and told["learner"]["sums"]["steps"] > 0
    state.write_text("{}")
    _, said = do(config, "sft")
    assert "supervised policy: starts again from step 0" in said and "damaged" in said
    assert config.folder.sft.weights.exists() and not state.exists()


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("removed", marks=pytest.mark.chaos),
        "changed",
        pytest.param("of other settings", marks=pytest.mark.chaos),
    ],
)
def test_a_seed_whose_model_is_not_there_any_more_is_trained_again(
    workspace: RunConfig, untroubled: RunConfig, tmp_path: Path, what: str
) -> None:
    config = of(workspace, tmp_path / "x")
    shutil.copytree(untroubled.folder.sft.path, config.folder.sft.path, dirs_exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        do(config, "reward", in_the_second_seed(config))
    path = config.folder.reward_seed(0).weights
    if what == "removed":
        path.unlink()
    elif what == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        model = config.reward_model.model_copy(update={"lr": 1e-5})
        with pytest.raises(KeyboardInterrupt):
            do(config.model_copy(update={"reward_model": model}), "reward", at_call(2, interrupt))
    do(config, "reward")
    assert same(config, untroubled)


@pytest.mark.chaos
def test_checkpoints_come_by_the_clock(workspace: RunConfig, tmp_path: Path) -> None:
    """None of a stage that is done before the first is due."""
    saved = 0
    save = LearnerGang.save_stage

    def counted(self: LearnerGang, folder: Path) -> dict[str, Any]:
        nonlocal saved
        saved += 1
        return save(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnerGang, "save_stage", counted)
        do(of(workspace, tmp_path / "often"), "sft")
        often, saved = saved, 0
        do(of(workspace, tmp_path / "never", sft={**SFT, "checkpoint_every_s": 600.0}), "sft")
    assert often > 3 and saved == 0


def test_a_pipeline_does_nothing_twice(
    done: tuple[RunConfig, dict[str, float]], workspace: RunConfig, tmp_path: Path
) -> None:
    config, first = done
    assert finished(config, "sft") == first
    assert finished(config, "reward") is not None
    assert finished(of(workspace, tmp_path / "x"), "sft") is None
    other = config.model_copy(update={"sft": config.sft.model_copy(update={"lr": 1e-3})})
    assert finished(other, "sft") is None
    path = config.folder.sft.weights
    as_it_was = path.read_bytes()
    try:
        path.write_bytes(as_it_was[:-1] + b"?")
        assert finished(config, "sft") is None, "its result was damaged"
        path.unlink()
        assert finished(config, "sft") is None
    finally:
        path.write_bytes(as_it_was)
    assert finished(config, "sft") == first
