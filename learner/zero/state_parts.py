"""The files of an engine's state (`learner.zero.state_files`), read in any parts by any process."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError

MASTER = "master"
"""What a parameter's fp32 weights are called."""
SHAPES = "shapes"
"""Where a file's metadata has the shapes of whole parameters, as JSON."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements begin .. end - 1 of a flattened parameter, in one file."""

    begin: int
    end: int
    file: Any
    key: str

    def read(self, first: int, last: int) -> Tensor:
        """Return elements first .. last - 1, and read no other where they are stored flat."""
        if "@" in self.key:
            found: Tensor = self.file.get_slice(self.key)[first - self.begin : last - self.begin]
            return found
        whole: Tensor = self.file.get_tensor(self.key)
        return whole.flatten()[first:last]


class StateParts:
    """All files of one engine's state, whatever number of ranks wrote them."""

    def __init__(self, folder: Path) -> None:
        """Look what is where; nothing is read yet.

        Raises:
            CheckpointError: no such state, or torn.
        """
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: defaultdict[tuple[str, str], list[_Part]] = defaultdict(list)
        paths = sorted(folder.glob("rank-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder}: no weights of training in it")
        for path in paths:
            try:
                self._add(safe_open(path, framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: torn ({error})") from None

    def _add(self, file: Any) -> None:
        shapes: dict[str, list[int]] = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
        self._shapes |= {name: tuple(shape) for name, shape in shapes.items()}
        for key in file.keys():  # noqa: SIM118 not a mapping
            name, _, rest = key.rpartition("|")
            kind, _, offset = rest.partition("@")
            stored = tuple(file.get_slice(key).get_shape())
            begin = int(offset or 0)
            self._parts[name, kind].append(_Part(begin, begin + math.prod(stored), file, key))
            if kind == MASTER and not offset:
                self._shapes.setdefault(name, stored)

    @property
    def names(self) -> Iterator[str]:
        """The parameters."""
        return (name for name, kind in self._parts if kind == MASTER)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a whole parameter; None where there is no such one."""
        return self._shapes.get(name)

    def read(self, name: str, kind: str, begin: int, end: int) -> Tensor:
        """Return elements begin .. end - 1 of a flattened parameter, float32 ``[end - begin]``.

        Raises:
            CheckpointError: some of them are in no file.
        """
        parts = sorted(self._parts.get((name, kind), []), key=lambda part: part.begin)
        found, reached = torch.empty(end - begin), begin
        for part in parts:
            first, last = max(reached, part.begin), min(end, part.end)
            if first == reached and first < last:
                found[first - begin : last - begin] = part.read(first, last)
                reached = last
        if reached < end or not parts:
            raise CheckpointError(f"{self._folder}: no {kind} of parameter '{name}'")
        return found


def masters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every trained parameter by name, whole, whatever number of ranks wrote it.

    Raises:
        CheckpointError: no such state, or torn.
    """
    parts = StateParts(folder)
    for name in parts.names:
        shape = parts.shape(name)
        assert shape is not None
        yield name, parts.read(name, MASTER, 0, math.prod(shape)).reshape(shape)
