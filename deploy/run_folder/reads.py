"""Which files each stage reads, by what they are to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common.config.model import checkpoint_of
from common.config.rewards import FunctionComponent
from common.config.run import RunConfig
from common.data.files.lists import files_at
from deploy.run_folder.fingerprints import files_in
from deploy.run_folder.weights import files_of, policy_start, reward_start, reward_weights
from reward_service.targets import source_of

Reads = Mapping[str, Sequence[str | Path]]
"""Files by their names in ``run.json``: ``data.prompts``, ``sft/policy.safetensors``."""
REUSED = "reuse."
"""Begins the name of what is taken from another run."""
FUNCTION = "function "
"""Begins the name of a user's reward function. Its file may be corrected while a run waits (exit
code 7 asks for that), so a change of it is told, not refused."""


def reads_of(stage: str, config: RunConfig) -> Reads:
    """Return the files that a stage (or `replay`) reads; what earlier stages left if it exists."""
    reads: dict[str, Sequence[str | Path]] = {}
    data, folder = config.data, config.folder
    own = [] if config.reuse.tokenizer else files_in(folder.tokenizer)
    if config.reuse.tokenizer:
        reads[f"{REUSED}tokenizer"] = files_in(folder.tokenizer)
    weights: dict[str, Path | None] = {}
    if stage == "sft":
        reads["data.demonstrations"] = files_at(data.demonstrations)
        if config.sft.start is not None:
            weights["sft.start"] = Path(config.sft.start)
        else:
            weights["model.start"] = checkpoint_of(config.model)
    elif stage == "reward":
        reads["data.demonstrations"] = files_at(data.demonstrations)
        reads["data.comparisons"] = files_at(data.comparisons)
        weights["reward_model.model.start"] = reward_start(config)
    else:
        if stage == "train":
            reads |= _functions(config) | {"data.prompts": files_at(data.prompts)}
            if config.evaluate.every:
                reads["data.evaluation"] = files_at(data.evaluation)
        weights["model.start"] = policy_start(config)
        weights["train.critic.start"] = checkpoint_of(config.train.critic)
        weights["reward_service.reference.start"] = checkpoint_of(config.reward_service.reference)
        if config.reward_service.needs_model:
            weights["reward_model.model.start"] = reward_weights(config)
    for name, path in weights.items():
        if path is not None and path.is_relative_to(folder.path):
            own += files_of(path)
        elif path is not None:
            reads[_name_of(config, path, name)] = files_of(path)
    return reads | {folder.name_of(path): [path] for path in own if path.exists()}


def _name_of(config: RunConfig, path: Path, name: str) -> str:
    """Return what weights outside of the run's folder are called."""
    for field, folder in config.reuse.model_dump().items():
        if folder is not None and path.is_relative_to(folder):
            return REUSED + field
    return "model.start" if path == checkpoint_of(config.model) else name


def is_given(name: str) -> bool:
    """Whether what a stage reads comes from outside, not from an earlier stage of the run."""
    return name.startswith(("data.", "tokenizer.path", FUNCTION, REUSED)) or name.endswith(".start")


def _functions(config: RunConfig) -> dict[str, Sequence[str | Path]]:
    """Find the files of the user's reward functions, as far as the path knows; none is imported."""
    files: dict[str, Sequence[str | Path]] = {}
    for component in config.reward_service.components.values():
        if isinstance(component, FunctionComponent):
            with suppress(ModuleNotFoundError):
                file = source_of(component.target.split(":")[0])
                files |= {FUNCTION + component.target: [file]} if file else {}
    return files
