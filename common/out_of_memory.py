"""Which exceptions say that memory ran out, and the error that names the setting to lower.

Python, NumPy, torch on a GPU and torch on the processor each say it in their own way; the last by a
plain RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
