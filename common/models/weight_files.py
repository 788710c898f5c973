"""Weights of a network as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import CheckpointError
from common.models.decoder import DECODER, Decoder


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors atomically. Metadata values are strings."""
    temporary = path.with_suffix(".tmp")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in state.items()},
        temporary,
        dict(metadata),
    )
    temporary.replace(path)


def load_decoder(decoder: Decoder, path: Path) -> None:
    """Load the decoder out of a network's file, strictly.

    Raises:
        CheckpointError: as `load_weights`.
    """
    load_weights(decoder, path, prefix=f"{DECODER}.")


def load_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load safetensors into a module, strictly; with a prefix only the names that begin with it.

    Raises:
        CheckpointError: missing, torn, or of another architecture (naming the first difference).
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such weights; run the stage that writes them first")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not safetensors: {error}") from None
    state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    ours: dict[str, Any] = dict(module.state_dict())
    for name in sorted(ours.keys() | state.keys()):
        needed = tuple(ours[name].shape) if name in ours else "absent"
        given = tuple(state[name].shape) if name in state else "absent"
        if needed != given:
            raise CheckpointError(
                f"{path}: of another architecture: '{name}' is {given}, this model needs {needed}"
            )
    module.load_state_dict(state)
