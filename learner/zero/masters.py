"""The weights in a checkpoint of training, read by one process without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError

MASTER = "master"
"""What `learner.zero.state_files` calls a parameter's fp32 weights."""


def masters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every trained parameter by name, whatever number of ranks wrote it.

    Raises:
        CheckpointError: no such state, or torn.
    """
    paths = sorted(folder.glob("rank-*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no weights of training in it")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 not a mapping
                    name, _, kind = key.rpartition("|")
                    if kind == MASTER:
                        yield name, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: torn ({error})") from None
