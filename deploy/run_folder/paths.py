"""Paths in a recipe: from the folder that a command is given in to ones that hold everywhere.

A relative path of a recipe is relative to the working folder of the command that first takes it.
From then on it is absolute, in ``config.yaml``, in every checkpoint and in the trajectory log, so
that `--resume` means the same files from any folder. Where the run's folder itself lies is read off
it each time: what a recipe names inside the folder is found in it wherever it was moved or copied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.config.model import ModelConfig, PretrainedConfig
from common.config.rewards import EndpointComponent
from common.config.run import RunConfig
from common.files import is_local

Model = TypeVar("Model", bound=ModelConfig | None)


def anchored(config: RunConfig) -> RunConfig:
    """Return the recipe with every path absolute; URIs stay as they are."""
    absolute = _with_paths(config, _absolute)
    return absolute.model_copy(update={"output": _absolute(config.output)})


def rebased(config: RunConfig, new: Path) -> RunConfig:
    """Return a saved recipe as that of the run whose folder is `new` now; its paths are absolute.

    What was inside the folder moved with it. A file elsewhere that is gone is looked for at the
    same place from the new folder, as in a project that was copied as a whole; what it holds is
    compared by whoever reads it (``run.json``).
    """
    config = anchored(config)
    old = config.run_dir

    def follow(path: str) -> str:
        if not is_local(path):
            return path
        if Path(path).is_relative_to(old):
            return str(new / Path(path).relative_to(old))
        beside = os.path.normpath(new / os.path.relpath(path, old))
        return beside if not _is_there(path) and _is_there(beside) else path

    here = {"output": str(new.parent), "name": new.name}
    return _with_paths(config, follow).model_copy(update=here)


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
    reuse = {name: maybe(path) for name, path in config.reuse.model_dump().items()}
    service = config.reward_service
    components = {
        name: component.model_copy(update={"dead_letters": maybe(component.dead_letters)})
        if isinstance(component, EndpointComponent)
        else component
        for name, component in service.components.items()
    }
    return config.model_copy(
        update={
            "model": started(config.model),
            "data": config.data.model_copy(update=data),
            "reuse": config.reuse.model_copy(update=reuse),
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


def _is_there(path: str) -> bool:
    """Whether there is what a path means; of a pattern, the folder that it is looked for in."""
    begins = re.split(r"[*?\[]", path, maxsplit=1)[0]
    return os.path.exists(path) or (begins != path and os.path.isdir(os.path.dirname(begins)))


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute()) if is_local(path) else path
