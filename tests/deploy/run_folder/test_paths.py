"""Relative paths of a recipe are made absolute once, and then hold from any folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.recipe import save_config
from common.config.rewards import HttpComponent
from common.config.run import RunConfig
from deploy.run_folder.paths import anchored
from tests.conftest import make_workspace
from tests.deploy.commands import Run


def test_every_path_of_a_recipe_is_absolute_once_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    files = {"prompts": ["a.jsonl", "~/b.jsonl", "s3://bucket/c.jsonl", "/d.jsonl"]}
    component = {"kind": "http", "target": "http://x/score", "dead_letters": "letters.jsonl"}
    config = anchored(
        RunConfig.model_validate(
            {
                "data": {**files, "demonstrations": ["e f.jsonl"], "evaluation": ["../g.jsonl"]},
                "tokenizer": {"path": "tokenizer.json"},
                "sft": {"start": "start.safetensors"},
                "reward_service": {"components": {"a": component}},
            }
        )
    )
    here = str(tmp_path)
    assert config.data.prompts == (
        f"{here}/a.jsonl",
        "/home/someone/b.jsonl",
        "s3://bucket/c.jsonl",
        "/d.jsonl",
    )
    assert config.data.demonstrations == (f"{here}/e f.jsonl",)
    assert config.data.evaluation == (f"{here}/../g.jsonl",)
    assert config.data.comparisons == ()
    assert config.tokenizer.path == f"{here}/tokenizer.json"
    assert config.sft.start == f"{here}/start.safetensors"
    component = config.reward_service.components["a"]
    assert isinstance(component, HttpComponent)
    assert component.dead_letters == f"{here}/letters.jsonl"
    assert config.output == f"{here}/runs"
    assert anchored(config) == config
    plain = anchored(RunConfig())
    assert plain.tokenizer.path is None


@pytest.mark.usefixtures("cluster")
def test_a_run_with_relative_paths_goes_on_from_another_folder(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_workspace(tmp_path)
    (tmp_path / "runs").mkdir()
    config.run_dir.rename(tmp_path / "runs" / "base")
    parts = {
        name: [str(Path(p).relative_to(tmp_path)) for p in getattr(config.data, name)]
        for name in ("demonstrations", "comparisons", "prompts", "evaluation")
    }
    values = config.model_dump(mode="json")
    values |= {"output": "runs", "data": {**values["data"], **parts}}
    values["train"] |= {"iterations": 2, "ppg": None}
    values["learner"] |= {"ranks": 1}
    save_config(RunConfig.model_validate(values), tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    begun = run("train", "--config", "recipe.yaml", "--stop-after", "1")
    assert begun.code == 0, begun
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    ended = run("train", "--resume", "../runs/base")
    assert ended.code == 0, ended
    assert json.loads((tmp_path / "runs" / "base" / "result.json").read_text())["iterations"] == 2
    assert run("report", "../runs/base").code == 0
    assert list(elsewhere.iterdir()) == []
