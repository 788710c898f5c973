"""The hash of weights, xxh3-128, at the speed of memory, alone or while copying.

`xxh3.c` does it, compiled for the processor at hand. Without a C compiler the package `xxhash`
does, which is built for any processor of its kind; the digests are the same.
"""

from __future__ import annotations

import ctypes
import functools
import logging
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

    def update(self, data: bytes | Bytes) -> None:
        """Hash contiguous bytes."""

    def copy(self, source: Bytes, destination: Bytes, *, around_caches: bool = False) -> None:
        """Copy as many bytes and hash what is stored.

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

    def update(self, data: bytes | Bytes) -> None:
        data = np.frombuffer(data, dtype=np.uint8)
        self._functions.take(self._at, data.ctypes.data, None, data.nbytes, False)

    def copy(self, source: Bytes, destination: Bytes, *, around_caches: bool = False) -> None:
        _check(source, destination)
        self._functions.take(
            *(self._at, source.ctypes.data, destination.ctypes.data, source.nbytes, around_caches)
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

    def update(self, data: bytes | Bytes) -> None:
        self._hash.update(data if isinstance(data, bytes) else data.data)

    def copy(self, source: Bytes, destination: Bytes, *, around_caches: bool = False) -> None:
        _check(source, destination)
        for begin in range(0, source.nbytes, _PIECE):
            held = destination[begin : begin + _PIECE]
            held[:] = source[begin : begin + _PIECE]
            self._hash.update(held.data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _check(source: Bytes, destination: Bytes) -> None:
    """Addresses say nothing of sizes, gaps and rights: C would write anywhere."""
    if source.nbytes != destination.nbytes:
        raise ValueError(f"{source.nbytes} bytes do not fit {destination.nbytes}")
    if not (source.flags.c_contiguous and destination.flags.carray):
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
    functions.take.argtypes = [address, address, address, ctypes.c_uint64, ctypes.c_int]
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
