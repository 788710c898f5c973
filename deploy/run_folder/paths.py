"""Paths in a recipe: from the folder that a command is given in to ones that hold everywhere.

A relative path of a recipe is relative to the working folder of the command that first takes it.
From then on it is absolute, in ``config.yaml`` and in every checkpoint, so that `--resume` means
the same files from any folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from common.config.run import RunConfig


def anchored(config: RunConfig) -> RunConfig:
    """The recipe with every path absolute; URIs stay as they are."""
    found = _with_paths(config, _absolute)
    return found.model_copy(update={"output": _absolute(config.output)})


def rebased(config: RunConfig, old: Path, new: Path) -> RunConfig:
    """The recipe of a run whose folder was `old` and is `new`: what lay inside it moved along."""

    def follow(path: str) -> str:
        inside = "://" not in path and Path(path).is_relative_to(old)
        return str(new / Path(path).relative_to(old)) if inside else path

    return _with_paths(config, follow)


def _with_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """Every path of a recipe but the run's own folder, changed."""

    def maybe(path: str | None) -> str | None:
        return change(path) if path else path

    lists = ("demonstrations", "comparisons", "prompts", "evaluation")
    data = {name: tuple(map(change, getattr(config.data, name))) for name in lists}
    service = config.reward_service
    components = {
        name: component.model_copy(update={"dead_letters": maybe(component.dead_letters)})
        for name, component in service.components.items()
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "tokenizer": config.tokenizer.model_copy(update={"path": maybe(config.tokenizer.path)}),
            "sft": config.sft.model_copy(update={"start": maybe(config.sft.start)}),
            "reward_service": service.model_copy(update={"components": components}),
        }
    )


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(os.path.expanduser(path)).absolute())
