"""Paths in a recipe: from the folder that a command is given in to ones that hold everywhere.

A relative path of a recipe is relative to the working folder of the command that first takes it.
From then on it is absolute, in ``config.yaml`` and in every checkpoint, so that `--resume` means
the same files from any folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.config.model import ModelConfig, PretrainedConfig
from common.config.rewards import HttpComponent
from common.config.run import RunConfig

Model = TypeVar("Model", bound=ModelConfig | None)


def anchored(config: RunConfig) -> RunConfig:
    """Return the recipe with every path absolute; URIs stay as they are."""
    absolute = _with_paths(config, _absolute)
    return absolute.model_copy(update={"output": _absolute(config.output)})


def rebased(config: RunConfig, old: Path, new: Path) -> RunConfig:
    """Return the recipe of a run whose folder was `old` and is `new`: what was inside moved too."""

    def follow(path: str) -> str:
        inside = "://" not in path and Path(path).is_relative_to(old)
        return str(new / Path(path).relative_to(old)) if inside else path

    return _with_paths(config, follow)


def _with_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """Change every path of a recipe but that of the run's own folder."""

    def maybe(path: str | None) -> str | None:
        return change(path) if path else path

    def started(model: Model) -> Model:
        if not isinstance(model, PretrainedConfig):
            return model
        return model.model_copy(update={"start": change(model.start)})

    lists = ("demonstrations", "comparisons", "prompts", "evaluation")
    data = {name: tuple(map(change, getattr(config.data, name))) for name in lists}
    tokenizer = {n: maybe(getattr(config.tokenizer, n)) for n in ("path", "chat_template")}
    service = config.reward_service
    components = {
        name: component.model_copy(update={"dead_letters": maybe(component.dead_letters)})
        if isinstance(component, HttpComponent)
        else component
        for name, component in service.components.items()
    }
    return config.model_copy(
        update={
            "model": started(config.model),
            "data": config.data.model_copy(update=data),
            "tokenizer": config.tokenizer.model_copy(update=tokenizer),
            "sft": config.sft.model_copy(update={"start": maybe(config.sft.start)}),
            "reward_model": config.reward_model.model_copy(
                update={"model": started(config.reward_model.model)}
            ),
            "train": config.train.model_copy(update={"critic": started(config.train.critic)}),
            "reward_service": service.model_copy(
                update={"components": components, "reference": started(service.reference)}
            ),
        }
    )


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(os.path.expanduser(path)).absolute())
