"""The C library of the native forward: how it is compiled and called.

`kernels/*.c` are compiled for this machine, a head shape and a precision. Compilation takes some
seconds, happens once per machine and shape, and is kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ClusterError
from common.models.decoder import Sizes
from common.native_code import shared_library

_FOLDER = Path(__file__).with_name("kernels")
# Sums may be reordered into vector lanes; the order is fixed by the binary, not by the batch.
_FLAGS = [
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-freciprocal-math",
    "-ffinite-math-only",
]
PANEL = 64
"""Columns of a panel of packed weights, as in native.h."""
KEYS = 16
"""Positions whose keys lie together, as in attention.c."""


def compiled(sizes: Sizes, rotary: int, dtype: torch.dtype) -> Path:
    """Return the shared library for a head shape and precision, compiled at the first call.

    Args:
        sizes: of which the heads count.
        rotary: dimensions of a head that positions turn.
        dtype: of weights and cache.

    Raises:
        ClusterError: there is no C compiler, or it fails.
    """
    shape = [f"-DHEADS={sizes.heads}", f"-DKV_HEADS={sizes.kv_heads}"]
    shape += [f"-DHEAD_DIM={sizes.head_dim}", f"-DROTARY={rotary}"]
    shape += ["-DBF16"] if dtype == torch.bfloat16 else []
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    included = sorted(_FOLDER.iterdir())
    try:
        return shared_library(
            "native kernels", _FOLDER / "forward.c", [*_FLAGS, *wide, *shape], included
        )
    except ClusterError as error:
        raise ClusterError(f"{error}, or set kernels to torch") from None


def library(path: Path) -> ctypes.CDLL:
    """Return the functions of forward.c with the types of their arguments."""
    functions = ctypes.CDLL(str(path))
    number, address, at = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER
    functions.weight_bytes.argtypes = []
    functions.pack.argtypes = [address, *[number] * 4, address, number, address]
    functions.forward.argtypes = [at(Model), at(Rows), at(Scratch), address, address, at(Seconds)]
    functions.read_states.argtypes = [at(Model), address, number, at(Scratch), address]
    functions.draw.argtypes = [address, number, number, at(Drawing), *[address] * 5]
    for name in ("pack", "forward", "read_states", "draw"):
        getattr(functions, name).restype = None
    functions.weight_bytes.restype = number
    return functions


def packed_itemsize(dtype: torch.dtype) -> int:
    """Return the bytes of a packed weight on this machine: 2 of bf16 where it multiplies those."""
    if dtype != torch.bfloat16:
        return dtype.itemsize
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return 4
    return 2 if "avx512_bf16" in flags else 4


def address_of(tensor: Tensor) -> int:
    """Return the address of a contiguous tensor's first element."""
    return tensor.data_ptr()


# The structures of native.h and forward.c.


class Packed(ctypes.Structure):
    """A weight matrix in panels."""

    _fields_ = (("data", ctypes.c_void_p), ("panels", ctypes.c_int64))


class Layer(ctypes.Structure):
    """Weights and cache of one block."""

    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("query", Packed),
        ("keyvalue", Packed),
        ("forward", Packed),
        ("outward", Packed),
        ("down", Packed),
        ("bias", ctypes.c_void_p),
        ("norm_q", ctypes.c_void_p),
        ("norm_k", ctypes.c_void_p),
        ("cos_q", ctypes.c_void_p),
        ("sin_q", ctypes.c_void_p),
        ("cos_k", ctypes.c_void_p),
        ("sin_k", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class Model(ctypes.Structure):
    """Sizes, all layers, and what comes before and after them."""

    _fields_ = (
        ("layers", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("ff", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("apart", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("dim_stride", ctypes.c_int64),
        ("mixed_stride", ctypes.c_int64),
        ("ff_stride", ctypes.c_int64),
        ("centred", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("logits_scale", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("scaled_norm", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("logits", Packed),
    )


class Rows(ctypes.Structure):
    """The rows of a step, its slots' blocks, and blocks to copy: (source, target, positions)."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("used", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("alone", ctypes.c_int64),
        ("copies", ctypes.c_int64),
        ("copy", ctypes.c_void_p),
    )


class Scratch(ctypes.Structure):
    """Memory for the activations of a step."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("fused", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("ff", ctypes.c_void_p),
    )


class Drawing(ctypes.Structure):
    """The distribution that tokens are drawn from."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("min_tokens", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("endings", ctypes.c_void_p),
    )


class Seconds(ctypes.Structure):
    """Seconds by kind of work, added up over calls."""

    _fields_ = (
        ("inward", ctypes.c_double),
        ("attention", ctypes.c_double),
        ("outward", ctypes.c_double),
        ("norms", ctypes.c_double),
        ("logits", ctypes.c_double),
    )
