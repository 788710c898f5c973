"""Memory in large pages, parts of which can be given back while the rest stays."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 2**21
"""Bytes of a large page."""


class Pages:
    """A tensor of zeros in pages of 2 MiB, where the system has them.

    With small pages, finding where one lies takes longer than reading what attention needs of it.
    A page takes memory from the first write on.

    Raises:
        MemoryError: the system has no room for it.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = math.prod(shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._memory = mmap.mmap(-1, size + _LARGE, flags=flags)
        except OSError as error:
            raise MemoryError(f"{size:,} bytes: {error.strerror}") from None
        self.prepare()
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._first = whole.data_ptr()
        begin = -self._first % _LARGE
        self.tensor = whole[begin : begin + size].view(dtype).view(*shape)

    def prepare(self) -> None:
        """Ask for large pages, also where memory was given back, before it is written again."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # A kernel without them.
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def give_back(self, part: Tensor) -> None:
        """Give the memory of a contiguous part back to the system; it reads as zeros then.

        What shares a page with others stays, as does all where the system cannot do it.
        """
        begin = part.data_ptr() - self._first
        end = begin + part.numel() * part.element_size()
        first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
        if first >= last or not hasattr(mmap, "MADV_DONTNEED"):
            return
        where = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # Or the system makes a large page of a small one that stays, and of what is given back.
            with contextlib.suppress(OSError):
                self._memory.madvise(mmap.MADV_NOHUGEPAGE, *where)
        with contextlib.suppress(OSError):  # Memory that is locked.
            self._memory.madvise(mmap.MADV_DONTNEED, *where)

    def __contains__(self, part: Tensor) -> bool:
        """Whether a tensor lies in this one."""
        inside = part.data_ptr() - self.tensor.data_ptr()
        return 0 <= inside < self.tensor.numel() * self.tensor.element_size()
