"""Weights in the layout that products read: panels of columns (`kernels/products.c`).

Each weight is told of as it is packed, so that it need not be there twice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.native.library import PANEL, Packed, address_of
from common.pages import Pages

_STRETCH = 64 * PANEL
"""Rows of the largest matrix that are packed at once."""

Spent = Callable[[Tensor], None]
"""Told of a weight, or a part of one, that is needed no more."""


class Panels:
    """Memory for all packed weights of a model; those of a new version overwrite the old ones."""

    def __init__(self, library: ctypes.CDLL, numbers: int, dtype: torch.dtype) -> None:
        """Have room for so many numbers, of weights in `dtype`."""
        self._library, self._dtype = library, dtype
        packed = dtype if library.weight_bytes() == 2 else torch.float32
        self._pages = Pages((numbers,), packed)
        self._end = 0
        self._spent: Spent = _keep

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._pages.tensor.numel() * self._pages.tensor.element_size()

    def begin(self, spent: Spent | None) -> None:
        """Pack anew from here on, and tell of what is packed."""
        self._pages.prepare()
        self._end, self._spent = 0, spent or _keep

    def forget(self) -> None:
        """Give the memory back."""
        self._pages.give_back(self._pages.tensor)

    def below(self, parts: Sequence[Tensor], each: int = 0) -> Packed:
        """Pack weights ``[any, length]`` of one input, one below the other or in turn.

        Args:
            parts: the weights.
            each: rows of each part in turn, of parts that are of one size; 0 takes all at once.
        """
        sizes = [len(part) for part in parts]
        rows = sum(up(size, each) for size in sizes) if each else sum(sizes)
        inner = up(parts[0].shape[1], 2)
        packed, to = self._room(rows, inner)
        places = torch.arange(up(rows, PANEL))
        turns = places // each if each else places
        for number, (part, begin) in enumerate(zip(parts, _before(sizes), strict=True)):
            if each:
                own = turns % len(parts) == number
                row = turns // len(parts) * each + places % each
            else:
                own, row = places >= begin, places - begin
            inside = own & (row < len(part))
            # What belongs to no part is zeros; what comes after this one writes its own.
            columns = torch.where(inside, row, torch.where(own, -1, -2))
            self._pack(part, 0, inner, inner, columns, to)
            self._spent(part)
        return packed

    def beside(self, parts: Sequence[Tensor]) -> Packed:
        """Pack weights ``[rows, any]`` whose inputs lie side by side."""
        sizes, rows = [part.shape[1] for part in parts], len(parts[0])
        inner = up(sum(sizes), 2)
        packed, to = self._room(rows, inner)
        for part, begin in zip(parts, _before(sizes), strict=True):
            last = part is parts[-1]
            end = inner if last else begin + part.shape[1]
            self._pack(part, begin, end, inner, _padded(rows), to)
            self._spent(part)
        return packed

    def stretches(self, head: Tensor) -> Packed:
        """Pack the largest tensor a stretch at a time: it is never here twice."""
        inner = up(head.shape[1], 2)
        packed, to = self._room(len(head), inner)
        for begin in range(0, len(head), _STRETCH):
            some = head[begin : begin + _STRETCH]
            self._pack(some, 0, inner, inner, _padded(len(some)), to[begin * inner :])
            self._spent(some)
        return packed

    def _room(self, rows: int, inner: int) -> tuple[Packed, Tensor]:
        """Take the next panels for rows of weights."""
        panels, begin = up(rows, PANEL) // PANEL, self._end
        self._end += panels * inner * PANEL
        to = self._pages.tensor[begin : self._end]
        return Packed(data=address_of(to), panels=panels), to

    def _pack(
        self, weight: Tensor, begin: int, end: int, inner: int, columns: Tensor, to: Tensor
    ) -> None:
        weight = weight.to(self._dtype).contiguous()
        panels = len(columns) // PANEL
        sizes = weight.shape[1], begin, end, inner
        self._library.pack(address_of(weight), *sizes, address_of(columns), panels, address_of(to))


def _keep(part: Tensor) -> None:
    """Let a weight be."""


def up(size: int, multiple: int) -> int:
    """Round up."""
    return -(-size // multiple) * multiple


def _padded(count: int) -> Tensor:
    """Numbers 0 .. count - 1, then -1 up to whole panels."""
    out = torch.full((up(count, PANEL),), -1)
    out[:count] = torch.arange(count)
    return out


def _before(sizes: Sequence[int]) -> list[int]:
    """Return what comes before each of some sizes."""
    return [sum(sizes[:index]) for index in range(len(sizes))]
