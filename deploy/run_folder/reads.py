"""Which files each stage reads, by what they are to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from common.config.rewards import FunctionComponent
from common.config.run import RunConfig
from common.models.weight_files import checkpoint_of
from deploy.run_folder.weights import files_of, policy_start, reward_weights

Reads = Mapping[str, Sequence[str | Path]]
"""Files by their names in ``run.json``: ``data.prompts``, ``sft/policy.safetensors``."""
FUNCTION = "function "
"""Begins the name of a user's reward function. Its file may be corrected while a run waits (exit
code 7 asks for that), so a change of it is told, not refused."""


def reads_of(stage: str, config: RunConfig) -> Reads:
    """Return the files that a stage (or `replay`) reads; what earlier stages left if it exists."""
    reads: dict[str, Sequence[str | Path]] = {}
    data, folder = config.data, config.folder
    own, begins = [folder.tokenizer], policy_start(config)
    if stage == "sft":
        reads["data.demonstrations"] = data.demonstrations
        if config.sft.start is not None:
            reads["sft.start"] = [config.sft.start]
        elif (start := checkpoint_of(config.model)) is not None:
            reads["model.start"] = files_of(start)
    elif stage == "reward":
        reads["data.demonstrations"] = data.demonstrations
        reads["data.comparisons"] = data.comparisons
        own += files_of(begins)
    else:
        if stage == "train":
            reads |= _functions(config) | {"data.prompts": data.prompts}
        own += files_of(begins)
        if config.reward_service.needs_model:
            own += files_of(reward_weights(config))
    for path in own:
        if path.is_relative_to(folder.path):
            reads |= {folder.name_of(path): [path]} if path.exists() else {}
        else:  # there is no supervised policy: training begins from the checkpoint itself
            reads["model.start"] = [*reads.get("model.start", ()), path]
    return reads


def is_given(name: str) -> bool:
    """Whether what a stage reads comes from outside, not from an earlier stage of the run."""
    return name.startswith(("data.", "tokenizer.path", "sft.start", "model.start", FUNCTION))


def _functions(config: RunConfig) -> dict[str, Sequence[str | Path]]:
    """Find the files of the user's reward functions, as far as the path knows; none is imported."""
    files: dict[str, Sequence[str | Path]] = {}
    for component in config.reward_service.components.values():
        if isinstance(component, FunctionComponent):
            file = _source(component.target.split(":")[0])
            files |= {FUNCTION + component.target: [file]} if file else {}
    return files


def _source(module: str) -> Path | None:
    """Find a module's source. `importlib.util.find_spec` would run its packages."""
    places: Sequence[str] | None = None
    origin: str | None = None
    names = module.split(".")
    for depth in range(len(names)):
        spec = PathFinder.find_spec(".".join(names[: depth + 1]), places)
        if spec is None:
            return None
        places, origin = spec.submodule_search_locations, spec.origin
    return Path(origin) if origin and Path(origin).is_file() else None
