"""The hash of weights, xxh3-128, at the speed of memory, alone or while copying.

`xxh3.c` computes it, compiled for this machine's processor. Without a C compiler the package
`xxhash` computes it, which is built for any processor of its kind; the digests are the same.
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
"""Bytes in all up to which xxh3 has another formula, which xxh3.c leaves to the package."""
_COPIED_AT_ONCE = 2**20
"""Bytes copied and hashed at a time: few enough to be in the processor's cache for the hash."""


class Hasher(Protocol):
    """xxh3-128 of bytes that come in parts, as if they were one array."""

    def update(self, parts: Sequence[bytes | Bytes]) -> None:
        """Hash parts, one after the other.

        Raises:
            ValueError: a part is not contiguous.
            BufferError: likewise.
        """

    def copy(
        self, sources: Sequence[Bytes], destination: Bytes, *, around_caches: bool = False
    ) -> None:
        """Copy parts into one array, one after the other, and hash what is stored.

        Args:
            sources: the parts.
            destination: as large as all parts together.
            around_caches: write past the processor's caches. It is a quarter faster, measured,
                where there are far more bytes than the caches hold.

        Raises:
            ValueError: the sizes differ, a part is not contiguous, or the destination is read-only.
        """

    def hexdigest(self) -> str:
        """Return the hash of the bytes so far; more may follow."""


def file_digest(path: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hasher() -> Hasher:
    """Return a hasher of no bytes yet; the first call on a machine compiles xxh3.c."""
    functions = library()
    return PackageHasher() if functions is None else NativeHasher(functions)


class NativeHasher:
    """Computes the hash with xxh3.c."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        self._state = _State()
        self._state_address = ctypes.addressof(self._state)
        functions.start(self._state_address)

    def update(self, parts: Sequence[bytes | Bytes]) -> None:
        """Hash parts, one after the other."""
        self._take([np.frombuffer(part, dtype=np.uint8) for part in parts], None)

    def copy(
        self, sources: Sequence[Bytes], destination: Bytes, *, around_caches: bool = False
    ) -> None:
        """Copy parts into one array, and hash what is stored."""
        _check(sources, destination)
        self._take(sources, destination.ctypes.data, around_caches)

    def _take(self, parts: Sequence[Bytes], to: int | None, around_caches: bool = False) -> None:
        """Hash all parts in one call of C.

        Each part empties the processor's caches, so a line of Python between two parts costs more
        than to hash a small one.
        """
        addresses = np.array([part.ctypes.data for part in parts], dtype=np.uint64)
        counts = np.array([part.nbytes for part in parts], dtype=np.uint64)
        self._functions.take(
            self._state_address,
            addresses.ctypes.data,
            counts.ctypes.data,
            len(parts),
            to,
            around_caches,
        )

    def hexdigest(self) -> str:
        """Return the hash of the bytes so far."""
        if self._state.total <= _SHORT:
            return xxhash.xxh3_128_hexdigest(bytes(self._state.kept[: self._state.total]))
        halves = (ctypes.c_uint64 * 2)()
        self._functions.finish(self._state_address, halves)
        return f"{halves[1]:016x}{halves[0]:016x}"


class PackageHasher:
    """Computes the hash with the package `xxhash`."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, parts: Sequence[bytes | Bytes]) -> None:
        """Hash parts, one after the other."""
        for part in parts:
            self._hash.update(part if isinstance(part, bytes) else part.data)

    def copy(
        self, sources: Sequence[Bytes], destination: Bytes, *, around_caches: bool = False
    ) -> None:
        """Copy parts into one array, and hash what is stored."""
        _check(sources, destination)
        stored = 0
        for source in sources:
            for begin in range(0, source.nbytes, _COPIED_AT_ONCE):
                part = source[begin : begin + _COPIED_AT_ONCE]
                copied = destination[stored : stored + part.nbytes]
                copied[:] = part
                self._hash.update(copied.data)
                stored += part.nbytes

    def hexdigest(self) -> str:
        """Return the hash of the bytes so far."""
        return self._hash.hexdigest()


def _check(sources: Sequence[Bytes], destination: Bytes) -> None:
    """Check what C cannot see by an address: sizes, gaps and the right to write."""
    total = sum(source.nbytes for source in sources)
    if total != destination.nbytes:
        raise ValueError(f"{total} bytes do not fit {destination.nbytes}")
    if not (all(s.flags.c_contiguous for s in sources) and destination.flags.carray):
        raise ValueError("bytes to copy are not contiguous, or not writable where they go")


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the functions of xxh3.c; None, with a warning, where it cannot be compiled."""
    try:
        path = shared_library("native hashes", Path(__file__).with_name("xxh3.c"), [])
        return typed(ctypes.CDLL(str(path)))
    except (ClusterError, OSError) as error:
        logging.getLogger(__name__).warning("%s; weights are hashed more slowly without", error)
        return None


def typed(functions: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the functions' arguments."""
    address, number = ctypes.c_void_p, ctypes.c_uint64
    functions.start.argtypes = [address]
    functions.take.argtypes = [address, address, address, number, address, ctypes.c_int]
    functions.finish.argtypes = [address, address]
    for name in ("start", "take", "finish"):
        getattr(functions, name).restype = None
    return functions


class _State(ctypes.Structure):
    """The structure of xxh3.c."""

    _fields_ = (
        ("sums", ctypes.c_uint64 * 8),
        ("total", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("held", ctypes.c_uint64),
        ("kept", ctypes.c_uint8 * 256),
    )
