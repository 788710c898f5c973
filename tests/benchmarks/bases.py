"""What experiments begin with: recipes under other names, and runs that go on from another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from common.config.recipe import load_config, save_config
from common.config.run import DataConfig, RunConfig
from deploy.quickstart.harvest import Pair, harvest
from deploy.quickstart.task import Task, make_task, settings_of, with_data

SEEDS = (0, 1, 2)
BASE_FILES = ("tokenizer.json", "sft", "reward_model", "data")


@cache
def _pairs() -> list[Pair]:
    return harvest()


@cache
def _task(seed: int, demonstrations: int, held_out: int) -> Task:
    settings = settings_of(load_config(_recipe_path()))
    settings = settings.model_copy(update={"demonstrations": demonstrations, "held_out": held_out})
    return make_task(_pairs(), settings, seed)


def task_of(config: RunConfig) -> Task:
    """Return the task that the base run of this config was made from."""
    settings = settings_of(config)
    return _task(config.seed, settings.demonstrations, settings.held_out)


def _recipe_path(kind: str = "quickstart") -> Path:
    return Path(str(resources.files("deploy.recipes") / f"{kind}.yaml"))


def recipe(out: Path, name: str, *overrides: str, kind: str = "quickstart") -> RunConfig:
    """Load a recipe that ships with Talipot under another name."""
    here = [f"output={out}", f"name={name}", "cluster.dashboard=false"]
    return load_config(_recipe_path(kind), [*here, *overrides])


def derive(base: Path, target: Path, overrides: tuple[str, ...]) -> RunConfig:
    """Begin a new run with the base run's data, supervised policy and reward model."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in BASE_FILES:
        source = base / name
        copy: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, target / name)
    here = [f"output={target.parent}", f"name={target.name}"]
    config = load_config(base / "config.yaml", [*overrides, *here])
    config = with_data(config.model_copy(update={"data": DataConfig()}), config.folder.data)
    save_config(config, target / "config.yaml")
    return config


def save(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write an experiment's summary: its mark that it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf8")
