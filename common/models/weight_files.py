"""Weights of a network as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import CheckpointError


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors atomically. Metadata values are strings."""
    temporary = path.with_suffix(".tmp")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in state.items()},
        temporary,
        dict(metadata),
    )
    temporary.replace(path)


def load_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load safetensors into a module, strictly; with a prefix only the names that begin with it.

    Raises:
        CheckpointError: missing, torn, or of another architecture (naming the first difference).
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such weights; run the stage that writes them first")
    try:
        held = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not safetensors: {error}") from None
    state = {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}
    ours: dict[str, Any] = dict(module.state_dict())
    for name in sorted(ours.keys() | state.keys()):
        expected = tuple(ours[name].shape) if name in ours else "absent"
        found = tuple(state[name].shape) if name in state else "absent"
        if expected != found:
            raise CheckpointError(
                f"{path}: of another architecture: '{name}' is {found}, this model needs {expected}"
            )
    module.load_state_dict(state)
