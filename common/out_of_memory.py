"""Memory: how much there is, which exceptions say that it ran out, and the setting to lower.

Python, NumPy, torch on a GPU and torch on the processor each say it in their own way; the last by a
plain RuntimeError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

from common.errors import ClusterError
from common.files import one_line

_MUCH: Final = 32 * 2**20
"""Bytes that are worth a return to the system."""
_LARGE: Final = 4 * 2**20
"""Bytes of a tensor that is no part of the heap in a frugal process."""
_MMAP_THRESHOLD: Final = -3
"""``M_MMAP_THRESHOLD`` of glibc's malloc.h."""
_TORCH_ON_PROCESSOR: Final = ("DefaultCPUAllocator", "not enough memory")


def says_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory could not be allocated."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _TORCH_ON_PROCESSOR)


def in_words(size: float) -> str:
    """Return a number of bytes as one reads it: in MiB, from 1 GiB on in GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def available_bytes() -> int | None:
    """Return the memory that a process here may still take; None where the system does not say."""
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # a container's limit; "max" is none
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        limits.append(max(0, limit - int((group / "memory.current").read_text(encoding="ascii"))))
    return min(limits, default=None)


def require_memory(needed: float, what: str, remedy: str) -> None:
    """Refuse what will not fit, before anything is loaded.

    Args:
        needed: bytes.
        what: that takes them.
        remedy: what to do instead.

    Raises:
        ClusterError: there is less.
    """
    have = available_bytes()
    if have is not None and needed > have:
        raise ClusterError(
            f"{what} takes {in_words(needed)} and {in_words(have)} are free here: {remedy}"
        )


class _HeapFacts(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@lru_cache(maxsize=1)
def _heap() -> tuple[Callable[[], int], Callable[[], object]] | None:
    """Return what tells the freed bytes of the heap, and what returns them; None without glibc."""
    library = ctypes.CDLL(None)
    try:
        facts, trim = library.mallinfo2, library.malloc_trim
    except AttributeError:
        return None
    facts.restype = _HeapFacts
    return lambda: int(facts().fordblks), lambda: trim(ctypes.c_size_t(0))


def return_freed() -> None:
    """Return to the system what this process has freed and keeps for itself, where that is much.

    Tensors of ever other sizes leave holes in the heap: of a model of 135M parameters 0.7 GB after
    a few micro-batches, beside 0.5 GB that are in use. It takes some 0.1 s a GB.
    """
    heap = _heap()
    if heap is not None:
        freed, trim = heap
        if freed() > _MUCH:
            trim()


def return_large_at_once() -> None:
    """From now on give large tensors back to the system when they are freed.

    glibc keeps blocks of up to 32 MiB in its heap once such a block was freed, and tensors of ever
    other sizes leave holes there: a learner of 135M parameters grew to 3.2 GB within a phase, and
    stays below 2.5 GB with this. It costs about as much as touching the memory does: nothing to be
    seen where products of matrices are large, and 8 % of a step of the quickstart's model, which
    does without.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of memory in the body into one that names what needed it, and the remedy.

    What the body allocated and freed is the system's again afterwards, for the next one of the
    processes that take turns.

    Raises:
        ClusterError: memory ran out in the body.
    """
    try:
        yield
        return_freed()
    except Exception as error:
        if not says_out_of_memory(error):
            raise
        text = one_line(error)
        raise ClusterError(f"out of memory in {what}: {remedy} ({text})") from error
