"""Tensors into a safetensors file: the one place that writes one.

The library makes files that only their owner may read, whatever the umask. A run is handed over, so
here they get the rights of the folder that they are in, as every other file of a run does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, which lie in memory one after another; metadata values are strings."""
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(path.parent.stat().st_mode & 0o666)
