"""A policy of our own architecture that was handed over: used from its folder, without its run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.config.workers import RolloutConfig
from common.errors import DataError
from common.run_folder import PolicyFolder, RunFolder
from deploy.run_folder.paths import rebased


def exported_policy(folder: str | Path) -> Path | None:
    """Return the weights in a folder that `talipot export` made of a PaLM; None of any other."""
    path = Path(os.path.expanduser(folder)).absolute()
    files = PolicyFolder(path)
    made = files.shape.is_file() and files.weights.is_file() and not RunFolder(path).config.exists()
    return files.weights if made else None


def config_of_exported(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a recipe for sampling an exported policy: its shape, and defaults but `overrides`.

    Responses are as long as the defaults say, or half the model's context where that is less.

    Raises:
        DataError: the folder does not say the model's shape.
        ConfigError: an override that cannot be applied.
    """
    files = PolicyFolder(Path(os.path.expanduser(folder)).absolute())
    try:
        shape = json.loads(files.shape.read_text(encoding="utf8"))
        room = min(RolloutConfig().max_response_tokens, int(shape["context"]) // 2)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{files.shape}: does not say the model's shape ({error}); export the policy again"
        ) from None
    own = [f"model={json.dumps(shape)}", f"rollout.max_response_tokens={room}"]
    return rebased(load_config(None, [*own, *overrides]), files.path)
