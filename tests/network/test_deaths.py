"""Each command killed midway, alone or with all of its machine, and its run's folder taken away.

A command that is given again ends in the results of one that nothing happened to; one that ends by
itself says in a line what to do, and leaves nothing running.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from common.config.recipe import save_config
from common.config.run import RunConfig
from tests.deploy.quickstart.test_quickstart import SMALL
from tests.network.deaths import Machine, command_of, removed, wait_for
from tests.network.nodes import why_not
from tests.workspaces import run_copy

if reason := why_not():
    pytest.skip(f"no machines can be made here: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
SUPERVISED = {"checkpoint_every_s": 0.001}
PLACES = {
    "learner": {"ranks": 2, "cpus_per_rank": 0.5, "deadline_s": 60},
    "rollout": {"actors": 1, "cpus_per_actor": 0.4},
    "reward_service": {"cpus_per_replica": 0.2},
    "cluster": {"dashboard": False},
    "sft": {"batch_tokens": 128, "epochs": 16.0, **SUPERVISED},
    "reward_model": {"batch_size": 8, "epochs": 8.0, "seeds": 2, "keep_seeds": True, **SUPERVISED},
    "train": {"iterations": 12, "checkpoint_every": 2},
    "evaluate": {"prompts": 150},
}
CODES = {"driver": {-9}, "power": {-9, 137}}
"""How a command ends by what was killed; others end by an error of ours, or go on to the end."""
OURS = {5, 8, 9}


@dataclass(frozen=True, slots=True)
class Stage:
    """A command on a run of its own, and how to see that it is midway."""

    run: Path
    command: Sequence[str]
    again: Sequence[str]
    midway: Callable[[Machine], bool]

    def results(self) -> dict[str, Any]:
        """What it is for: weights, or figures."""
        found: dict[str, Any] = {}
        for path in sorted(self.run.rglob("*.safetensors")):
            if "checkpoints" not in path.parts:
                for name, tensor in load_file(path).items():
                    found[f"{path.relative_to(self.run)} {name}"] = tensor.tolist()
        evaluation = self.run / "evaluation.json"
        if evaluation.exists():
            facts = json.loads(evaluation.read_bytes())
            found["evaluation"] = {k: v for k, v in facts.items() if "second" not in k}
        return found


def prepared(workspace: RunConfig, folder: Path, stage: str) -> Stage:
    """A run in which a stage is to be done."""
    folder.mkdir()
    config = run_copy(workspace, folder, **PLACES)
    recipe, run = folder / "recipe.yaml", config.run_dir
    save_config(config, recipe)

    def unfinished(machine: Machine) -> bool:
        return any((run / "unfinished").glob("*/checkpoints/*/state.json"))

    def trained(machine: Machine) -> bool:
        log = run / "metrics.jsonl"
        return log.exists() and len(re.findall('"train"', log.read_text())) >= 5

    of_recipe = ["--config", str(recipe)]
    if stage == "quickstart":
        values = {**yaml.safe_load(SMALL), "cluster": {"dashboard": False}}
        values |= {"output": str(folder), "name": "quick"}
        values["rollout"] |= {"actors": 1, "cpus_per_actor": 0.4}
        values["reward_service"] = {"cpus_per_replica": 0.2}
        values["train"]["iterations"], run = 8, folder / "quick"
        recipe.write_text(yaml.safe_dump(values), encoding="utf8")
        return Stage(run, ["quickstart", *of_recipe], ["quickstart", *of_recipe], trained)
    midway = trained if stage == "train" else unfinished
    return Stage(run, [stage, *of_recipe], [stage, "--resume", str(run)], midway)


def evaluated(run: Path) -> Stage:
    """The evaluation of a run that is trained."""

    def sampling(machine: Machine) -> bool:
        return any("ray::RolloutActor." in command_of(p) for p in machine.node.processes())

    return Stage(run, ["evaluate", str(run)], ["evaluate", str(run)], sampling)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, {"HOME": str(tmp_path)})
    yield made
    made.close()


@pytest.fixture(scope="module")
def untroubled(
    workspace: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Results of a stage that nothing happens to, by its name."""
    found: dict[str, dict[str, Any]] = {}

    def of(stage: str) -> dict[str, Any]:
        if stage not in found:
            folder = tmp_path_factory.mktemp(f"untroubled-{stage}")
            whole, machine = prepared(workspace, folder / "x", stage), Machine(folder, {})
            try:
                code, said = machine.end(machine.start(whole.command))
                assert code == 0, said
                machine.deserted()
            finally:
                machine.close()
            found[stage] = whole.results()
            assert found[stage]
        return found[stage]

    return of


def midway(machine: Machine, stage: Stage) -> subprocess.Popen[bytes]:
    """The stage's command, begun."""
    started = machine.start(stage.command)
    wait_for(lambda: stage.midway(machine), started, machine.log)
    return started


def told(code: int, said: str, codes: set[int] = OURS) -> None:
    """A command that ended by a fault: one line that says what to do."""
    last = said.strip().splitlines()[-1]
    assert code in codes and last.startswith("error ") and "Traceback" not in said, (code, said)


def killed_and_given_again(
    of: Stage, victim: str, machine: Machine, expected: dict[str, Any]
) -> None:
    """Kill something midway; whatever does not go on by itself is given again."""
    started = midway(machine, of)
    machine.kill(victim)
    code, said = machine.end(started)
    if victim in CODES:
        assert code in CODES[victim]
    elif code:
        told(code, said)
    machine.deserted()
    if code:
        code, said = machine.end(machine.start(of.again))
        assert code == 0, said
    assert of.results() == expected


@pytest.mark.parametrize("victim", ["driver", "rank", "raylet", "GCS", "power"])
@pytest.mark.parametrize("stage", ["sft", "reward", "train", "quickstart"])
def test_a_stage_that_is_killed_is_given_again(
    stage: str, victim: str, workspace: RunConfig, tmp_path: Path, machine: Machine, untroubled: Any
) -> None:
    expected = untroubled(stage)
    of = prepared(workspace, tmp_path / "x", stage)
    killed_and_given_again(of, victim, machine, expected)


@pytest.mark.parametrize("victim", ["driver", "worker", "raylet", "GCS", "power"])
def test_an_evaluation_that_is_killed_is_given_again(
    victim: str, workspace: RunConfig, tmp_path: Path, machine: Machine
) -> None:
    trained = prepared(workspace, tmp_path / "x", "train")
    code, said = machine.end(machine.start(trained.command))
    assert code == 0, said
    of = evaluated(trained.run)
    code, said = machine.end(machine.start(of.command))
    assert code == 0, said
    expected = of.results()
    (of.run / "evaluation.json").unlink()
    killed_and_given_again(of, victim, machine, expected)


@pytest.mark.parametrize("stage", ["sft", "reward", "train", "quickstart"])
def test_a_folder_that_nobody_may_write_into_any_more(
    stage: str, workspace: RunConfig, tmp_path: Path, machine: Machine, untroubled: Any
) -> None:
    expected = untroubled(stage)
    of = prepared(workspace, tmp_path / "x", stage)
    started = midway(machine, of)
    machine.read_only(of.run)
    code, said = machine.end(started)
    told(code, said, {8})
    machine.deserted()
    code, said = machine.end(machine.start(of.again))
    told(code, said, {8})
    machine.writable(of.run)
    code, said = machine.end(machine.start(of.again))
    assert code == 0, said
    assert of.results() == expected


@pytest.mark.parametrize("stage", ["sft", "reward", "train", "quickstart"])
def test_a_folder_that_is_removed(
    stage: str, workspace: RunConfig, tmp_path: Path, machine: Machine
) -> None:
    """Nothing is left to go on with: a line says so, and nothing stays behind."""
    of = prepared(workspace, tmp_path / "x", stage)
    started = midway(machine, of)
    removed(of.run)
    code, said = machine.end(started)
    told(code, said, {3, 4, 8})
    machine.deserted()
