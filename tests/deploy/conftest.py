"""What tests of commands and of pools share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.cli.main import main
from tests.deploy.commands import Outcome, Run
from tests.deploy.control.simulated import Rig
from tests.workspaces import run_copy


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, shown.err, shown.out)

    return call


@pytest.fixture
def recipe(workspace: RunConfig, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe: a good one with some sections changed."""

    def write(**sections: Any) -> str:
        values = workspace.model_dump(mode="json")
        for name, changes in sections.items():
            merged = {**values[name], **changes} if isinstance(changes, dict) else changes
            values[name] = merged
        copied = run_copy(RunConfig.model_validate(values), tmp_path)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(copied.model_dump(mode="json")), encoding="utf8")
        return str(path)

    return write


@pytest.fixture
def folder(workspace: RunConfig, tmp_path: Path) -> Path:
    made = run_copy(workspace, tmp_path, cluster={"address": "127.0.0.1:1"})
    save_config(made, made.run_dir / "config.yaml")
    line = {"stage": "sft", "step": 7, "time": 0.0, "metrics": {"loss": 1.5}}
    (made.run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf8")
    return made.run_dir


@pytest.fixture
def rig(cluster: None) -> Iterator[Callable[..., Rig]]:
    """Makes rigs, and stops them after the test."""
    made: list[Rig] = []

    def make(size: int, **settings: Any) -> Rig:
        made.append(Rig(size, **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()
