"""Relative paths of a recipe are made absolute once, and then hold from any folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.config.model import checkpoint_of
from common.config.recipe import save_config
from common.config.rewards import HttpComponent
from common.config.run import RunConfig
from deploy.run_folder.paths import anchored, rebased
from tests.deploy.commands import Run
from tests.workspaces import make_workspace


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


def test_what_a_recipe_names_is_found_where_it_is_now(tmp_path: Path) -> None:
    project = tmp_path / "project"
    names = ("other/inside.jsonl", "other/*.jsonl", "gone.jsonl", "gone/*.jsonl")
    outside = [f"{project}/{name}" for name in names]
    config = RunConfig.model_validate(
        {
            "output": str(project / "runs"),
            "data": {
                "prompts": [str(project / "runs" / "run" / "data" / "prompts.jsonl")],
                "demonstrations": [*outside, "s3://bucket/c.jsonl", "/d.jsonl"],
            },
            "model": {"start": str(project / "runs" / "run" / "start")},
        }
    )
    new = tmp_path / "copy" / "runs" / "renamed"
    (tmp_path / "copy" / "other").mkdir(parents=True)
    (tmp_path / "copy" / "other" / "inside.jsonl").touch()
    found = rebased(config, new)
    assert found.run_dir == new
    assert found.data.prompts == (f"{new}/data/prompts.jsonl",)
    assert checkpoint_of(found.model) == new / "start"
    assert found.data.demonstrations == (
        f"{tmp_path}/copy/other/inside.jsonl",
        f"{tmp_path}/copy/other/*.jsonl",
        f"{project}/gone.jsonl",
        f"{project}/gone/*.jsonl",
        "s3://bucket/c.jsonl",
        "/d.jsonl",
    )
    (project / "other").mkdir(parents=True)
    (project / "other" / "inside.jsonl").touch()
    assert rebased(config, new).data.demonstrations == (*outside, "s3://bucket/c.jsonl", "/d.jsonl")


@pytest.mark.usefixtures("cluster")
def test_a_run_works_wherever_its_folder_is(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, moved, elsewhere = (tmp_path / n for n in ("project", "moved", "elsewhere"))
    project.mkdir()
    elsewhere.mkdir()
    begin(project, run, monkeypatch)
    project.rename(moved)
    monkeypatch.chdir(elsewhere)
    resumed = run("train", "--resume", "../moved/runs/base")
    assert resumed.code == 0, resumed
    assert "changed: " not in resumed.out, "that a run lies elsewhere is no change of its recipe"
    facts = json.loads((moved / "runs" / "base" / "result.json").read_text(encoding="utf8"))
    assert facts["iterations"] == 2
    copy = tmp_path / "colleague" / "copy"
    shutil.copytree(moved / "runs" / "base", copy)
    shutil.rmtree(moved)
    # What needs workers too (evaluate, replay) is done to a moved run by the journey.
    for command in (["report"], ["sample", "-p", "open:"]):
        done = run(*command, str(copy))
        assert done.code == 0, (command, done)
    assert run("export", str(copy), "out", "--checkpoint", "latest").code == 0
    assert [p.name for p in elsewhere.iterdir()] == ["out"]
    for path in (*copy.rglob("*"), *(elsewhere / "out").rglob("*")):
        if path.is_file():
            rights = path.stat().st_mode & 0o666
            assert rights == path.parent.stat().st_mode & 0o666, f"{path}: {oct(rights)}"


def begin(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train half a run in a project's folder, by a recipe of relative paths."""
    config = make_workspace(project)
    (project / "runs").mkdir()
    config.run_dir.rename(project / "runs" / "base")
    inside = project / "runs" / "base" / "held-out.jsonl"
    shutil.copyfile(config.data.evaluation[0], inside)
    values = config.model_dump(mode="json")
    data = {
        name: [str(Path(p).relative_to(project)) for p in getattr(config.data, name)]
        for name in ("demonstrations", "comparisons", "prompts")
    }
    data["evaluation"] = [str(inside.relative_to(project))]
    values |= {"output": "runs", "data": {**values["data"], **data}}
    values["train"] |= {"iterations": 2, "ppg": None}
    values["learner"] |= {"ranks": 1}
    values["evaluate"] |= {"prompts": 4}
    save_config(RunConfig.model_validate(values), project / "recipe.yaml")
    monkeypatch.chdir(project)
    begun = run("train", "--config", "recipe.yaml", "--stop-after", "1")
    assert begun.code == 0, begun
