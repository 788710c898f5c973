"""Memory: how much there is, which exceptions say that it ran out, and the setting to lower.

Python, NumPy, torch on a GPU and torch on the processor each say it in their own way; the last by a
plain RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import torch

from common.errors import ClusterError
from common.files import one_line

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


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of memory in the body into one that names what needed it, and the remedy.

    Raises:
        ClusterError: memory ran out in the body.
    """
    try:
        yield
    except Exception as error:
        if not says_out_of_memory(error):
            raise
        text = one_line(error)
        raise ClusterError(f"out of memory in {what}: {remedy} ({text})") from error
