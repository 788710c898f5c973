"""The hash of weights, xxh3-128, at the speed of memory, alone or while copying.

`xxh3.c` does it, compiled for the processor at hand. Without a C compiler the package `xxhash`
does, which is built for any processor of its kind; the digests are the same.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from common.errors import ClusterError
from common.native_code import shared_library

Bytes = npt.NDArray[np.uint8]

_SHORT = 240
"""Bytes in all up to which the hash is of another kind, which xxh3.c leaves to the package."""
_PIECE = 2**20
"""Bytes copied and hashed at a time: few enough to be in the processor's cache for the hash."""


class Hasher(Protocol):
    """xxh3-128 of bytes that come in parts, as if they were one."""

    def update(self, parts: Sequence[bytes | Bytes]) -> None:
        """Hash parts, one behind the other.

        Raises:
            ValueError, BufferError: one is not contiguous.
        """

    def copy(
        self, sources: Sequence[Bytes], destination: Bytes, *, around_caches: bool = False
    ) -> None:
        """Copy parts to where they lie one behind the other, and hash what is stored.

        Args:
            around_caches: of bytes by far more than the caches hold, and so from memory again
                when they are used: a quarter faster, measured.

        Raises:
            ValueError: the sizes differ, or one is not contiguous, or the destination read-only.
        """

    def hexdigest(self) -> str:
        """Of the bytes so far; more may follow."""


def hasher() -> Hasher:
    """Of no bytes yet; compiles xxh3.c where that has not been done on this machine."""
    functions = library()
    return PackageHasher() if functions is None else NativeHasher(functions)


class NativeHasher:
    """By xxh3.c."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        self._state = _State()
        self._at = ctypes.addressof(self._state)
        functions.start(self._at)

    def update(self, parts: Sequence[bytes | Bytes]) -> None:
        self._take([np.frombuffer(part, dtype=np.uint8) for part in parts], None)

    def copy(
        self, sources: Sequence[Bytes], destination: Bytes, *, around_caches: bool = False
    ) -> None:
        _check(sources, destination)
        self._take(sources, destination.ctypes.data, around_caches)

    def _take(self, parts: Sequence[Bytes], to: int | None, around_caches: bool = False) -> None:
        """All in one call: between parts, which sweep the processor's caches, a line of Python
        costs more than to hash a small one."""
        addresses = np.array([part.ctypes.data for part in parts], dtype=np.uint64)
        counts = np.array([part.nbytes for part in parts], dtype=np.uint64)
        self._functions.take(
            *(self._at, addresses.ctypes.data, counts.ctypes.data, len(parts), to, around_caches)
        )

    def hexdigest(self) -> str:
        if self._state.total <= _SHORT:
            return xxhash.xxh3_128_hexdigest(bytes(self._state.kept[: self._state.total]))
        halves = (ctypes.c_uint64 * 2)()
        self._functions.finish(self._at, halves)
        return f"{halves[1]:016x}{halves[0]:016x}"


class PackageHasher:
    """By the package `xxhash`."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, parts: Sequence[bytes | Bytes]) -> None:
        for part in parts:
            self._hash.update(part if isinstance(part, bytes) else part.data)

    def copy(
        self, sources: Sequence[Bytes], destination: Bytes, *, around_caches: bool = False
    ) -> None:
        _check(sources, destination)
        reached = 0
        for source in sources:
            for begin in range(0, source.nbytes, _PIECE):
                piece = source[begin : begin + _PIECE]
                held = destination[reached : reached + piece.nbytes]
                held[:] = piece
                self._hash.update(held.data)
                reached += piece.nbytes

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _check(sources: Sequence[Bytes], destination: Bytes) -> None:
    """Addresses say nothing of sizes, gaps and rights: C would write anywhere."""
    total = sum(source.nbytes for source in sources)
    if total != destination.nbytes:
        raise ValueError(f"{total} bytes do not fit {destination.nbytes}")
    if not (all(s.flags.c_contiguous for s in sources) and destination.flags.carray):
        raise ValueError("bytes to copy are not contiguous, or not writable where they go")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of xxh3.c; none, and a warning, where it cannot be compiled."""
    try:
        path = shared_library("native hashes", Path(__file__).with_name("xxh3.c"), [])
        return typed(ctypes.CDLL(str(path)))
    except (ClusterError, OSError) as error:
        logging.getLogger(__name__).warning("%s; weights are hashed more slowly without", error)
        return None


def typed(functions: ctypes.CDLL) -> ctypes.CDLL:
    """With their arguments' types."""
    address = ctypes.c_void_p
    functions.start.argtypes = [address]
    functions.take.argtypes = [*(address,) * 3, ctypes.c_uint64, address, ctypes.c_int]
    functions.finish.argtypes = [address, address]
    for name in ("start", "take", "finish"):
        getattr(functions, name).restype = None
    return functions


class _State(ctypes.Structure):
    """The structure of xxh3.c."""

    _fields_ = (
        ("sums", ctypes.c_uint64 * 8),
        *((name, ctypes.c_uint64) for name in ("total", "done", "held")),
        ("kept", ctypes.c_uint8 * 256),
    )
