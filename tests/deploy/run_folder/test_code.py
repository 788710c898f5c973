"""Reward functions are copied into the run as modules that can be imported from there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from common.config.run import RunConfig
from common.run_folder import RunFolder
from deploy.run_folder.code import keep_functions
from deploy.run_folder.reads import reads_of


def config(*targets: str) -> RunConfig:
    components = {f"c{n}": {"kind": "function", "target": t} for n, t in enumerate(targets)}
    return RunConfig.model_validate(
        {"reward_service": {"components": components}, "data": {"prompts": []}}
    )


def test_each_lies_where_its_module_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    for name in ("mine.py", "scores/__init__.py", "scores/titles.py"):
        path = theirs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"NAME = {name!r}\n", encoding="utf8")
    monkeypatch.syspath_prepend(theirs)
    targets = ("mine:a", "scores:b", "scores.titles:c", "nowhere:d", "deploy.instruct.reward:score")
    folder = RunFolder(tmp_path / "run")
    keep_functions(folder, reads_of("train", config(*targets)))
    kept = {str(p.relative_to(folder.code)) for p in folder.code.rglob("*.py")}
    assert kept == {"mine.py", "scores/__init__.py", "scores/titles.py"}
    for name in kept:
        spec = importlib.util.spec_from_file_location("copy", folder.code / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert name == module.NAME


def test_a_run_goes_on_by_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.code.mkdir(parents=True)
    (folder.code / "own_copy.py").write_text("A = 1\n", encoding="utf8")
    monkeypatch.syspath_prepend(folder.code)
    keep_functions(folder, reads_of("train", config("own_copy:score")))
    assert (folder.code / "own_copy.py").read_text(encoding="utf8") == "A = 1\n"


def test_a_run_of_a_reward_model_keeps_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    keep_functions(folder, {"data.prompts": ["prompts.jsonl"]})
    assert not folder.path.exists()
