"""The forward for processors: `native/*.c`, compiled for this machine, head shape and precision.

Weights are packed for it, so adapters are merged into them: it computes none beside them.

Compilation takes some seconds, happens once per machine and shape, and is kept in the user's cache
folder. On a GPU `actors.generation.torch_forward` runs instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.generation.forward import Layer, Step, rope_tables
from common.config.model import ModelConfig
from common.errors import ClusterError
from common.logprobs import Sampling
from common.native_code import shared_library

_FOLDER = Path(__file__).with_name("native")
_FLAGS = [
    *("-fopenmp", "-ffp-contract=fast"),
    # Sums may be reordered into vector lanes; the order is fixed by the binary, not by the batch.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
    *("-freciprocal-math", "-ffinite-math-only"),
]
_PANEL = 64
"""Columns of a panel of packed weights, as in native.h."""
_BLOCK = 16
"""Positions of a block of keys, as in attention.c."""
_HUGE = 2**21
"""Bytes of a large page."""


class NativeForward:
    """Weights, keys and values of all slots, on the processor."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, slots: int) -> None:
        """Products and cache in `dtype`.

        Raises:
            ClusterError: there is no C compiler, or it fails.
        """
        self._library = _library(compiled(config, dtype))
        self._config = config
        self._dtype = dtype
        self._packed_dtype = dtype if self._library.weight_bytes() == 2 else torch.float32
        context = _up(config.context, _BLOCK)
        shape = (config.layers, slots, context, config.head_dim)
        self._keys, self._values = _zeros(shape, dtype), _zeros(shape, dtype)
        self._tables = rope_tables(config)
        self._inner = config.heads * config.head_dim
        self._ff = config.ff_mult * config.dim
        self._strides = _up(config.dim, 2), _up(self._inner + self._ff, 2)
        self._columns = self._sections()
        self._model = _Model(
            layers=config.layers,
            dim=config.dim,
            inner=self._inner,
            ff=self._ff,
            vocabulary=config.vocab_size,
            context=context,
            dim_stride=self._strides[0],
            both_stride=self._strides[1],
            **dict(zip(("cos_q", "sin_q", "cos_k", "sin_k"), map(_at, self._tables), strict=True)),
        )
        self._logits = _zeros((slots, config.vocab_size), torch.float32)
        self._room_rows = 0
        self._room: list[Tensor] = []
        self._scratch = _Scratch()
        widths = sum(map(len, self._columns)), _up(config.dim, _PANEL)
        panels = config.layers * sum(map(math.prod, zip(widths, self._strides, strict=True)))
        logits = _up(config.vocab_size, _PANEL) * self._strides[0]
        self._panels = _zeros((panels + logits,), self._packed_dtype)
        """All packed weights; a version is packed over the one before."""
        self._reached = 0
        self._weights: list[Tensor] = []
        self._spent = _Spent()

    def take(self, layers: Sequence[Layer], norm: Tensor, embedding: Tensor) -> None:
        """Run with these weights from now on."""
        query, keyvalue, forward = self._columns
        made = (_Layer * len(layers))()
        self._reached = 0
        for index, layer in enumerate(layers):
            inward = layer.inward.weight
            outward = torch.cat((layer.attn_out.weight, layer.ff_out.weight), dim=1)
            made[index] = _Layer(
                norm=_at(layer.norm),
                query=self._packed(inward, query),
                keyvalue=self._packed(inward, keyvalue),
                forward=self._packed(inward, forward),
                outward=self._packed(outward, _padded(0, self._config.dim)),
                keys=_at(self._keys[index]),
                values=_at(self._values[index]),
            )
        self._layers = made
        self._model.layer = ctypes.cast(made, ctypes.POINTER(_Layer))
        self._model.norm, self._model.embedding = _at(norm), _at(embedding)
        self._model.logits = self._packed(embedding, _padded(0, len(embedding)))
        # C holds addresses: whatever they point to must live as long as these weights are in use.
        self._weights = [norm, embedding, *(layer.norm for layer in layers)]

    def run(self, step: Step) -> Tensor:
        """fp32 logits ``[S, V]`` after the newest token of each slot, until the next call: fresh
        pages for them would cost a fiftieth of a step."""
        numbers = [
            number
            for copy in step.copies
            for target in copy.targets
            for number in (copy.source, target, copy.positions)
        ]
        copies, count = (ctypes.c_int64 * len(numbers))(*numbers), step.rows.shape[1]
        first = step.rows.ctypes.data
        tokens, slots, positions = (first + 8 * count * row for row in range(3))
        asked = _Step(
            *(count, step.used, tokens, slots, positions),
            *(len(numbers) // 3, ctypes.addressof(copies)),
        )
        logits = self._logits[: step.used]
        self._make_room(count)
        self._library.forward(self._model, asked, self._scratch, _at(logits), self._spent)
        return logits

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        self._library.move(self._model, source, target, positions)

    def draw(
        self, logits: Tensor, sampling: Sampling, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `common.logprobs.draw`, for fp32 logits ``[B, V]`` without a filter."""
        rows, vocabulary = logits.shape
        tokens, logprobs = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.float32)
        self._library.draw(
            *(_at(logits), rows, vocabulary, sampling.temperature),
            *(uniforms.ctypes.data, tokens.ctypes.data, logprobs.ctypes.data),
        )
        return tokens, logprobs

    def seconds(self) -> dict[str, float]:
        """Time spent so far, by kind of work."""
        return {name: float(getattr(self._spent, name)) for name in _KINDS}

    def _sections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the input projection in the order of the panels: queries, keys and values, and
        the two sides of SwiGLU side by side."""
        inner, kv, ff, half = self._inner, 2 * self._config.head_dim, self._ff, _PANEL // 2
        up = _padded(inner + kv, ff, half).view(-1, half)
        gate = _padded(inner + kv + ff, ff, half).view(-1, half)
        both = torch.stack((up, gate), dim=1).flatten()
        return _padded(0, inner), _padded(inner, kv), both

    def _packed(self, weight: Tensor, columns: Tensor) -> _Packed:
        """Weights ``[any, length]`` as panels of the columns asked for."""
        weight = weight.contiguous()
        panels, inner = len(columns) // _PANEL, _up(weight.shape[1], 2)
        made = self._panels[self._reached : self._reached + panels * inner * _PANEL]
        self._reached += len(made)
        self._library.pack(_at(weight), weight.shape[1], inner, _at(columns), panels, _at(made))
        return _Packed(data=_at(made), panels=panels)

    def _make_room(self, rows: int) -> None:
        """Room for the activations of so many rows; kept, because fresh pages cost time."""
        if rows <= self._room_rows:
            return
        fused = sum(len(columns) for columns in self._columns[:2])
        self._room = [_zeros((rows, self._config.dim), torch.float32)] + [
            _zeros((rows, width), self._dtype)
            for width in (self._strides[0], fused, self._strides[1])
        ]
        self._scratch = _Scratch(*map(_at, self._room))
        self._room_rows = rows


def compiled(config: ModelConfig, dtype: torch.dtype) -> Path:
    """The shared library for a head shape and precision, compiled unless it is there already.

    Raises:
        ClusterError: there is no C compiler, or it fails.
    """
    shape = [f"-DHEADS={config.heads}", f"-DHEAD_DIM={config.head_dim}"]
    shape += ["-DBF16"] if dtype == torch.bfloat16 else []
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    included = sorted(_FOLDER.iterdir())
    try:
        return shared_library(
            "native kernels", _FOLDER / "forward.c", [*_FLAGS, *wide, *shape], included
        )
    except ClusterError as error:
        raise ClusterError(f"{error}, or set rollout.kernels=torch") from None


def _library(path: Path) -> ctypes.CDLL:
    """The functions of forward.c with their arguments' types."""
    library = ctypes.CDLL(str(path))
    number, address, at = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER
    library.weight_bytes.argtypes = []
    library.pack.argtypes = [address, number, number, address, number, address]
    library.forward.argtypes = [at(_Model), at(_Step), at(_Scratch), address, at(_Spent)]
    library.move.argtypes = [at(_Model), number, number, number]
    library.draw.argtypes = [address, number, number, ctypes.c_float, address, address, address]
    for name in ("pack", "forward", "move", "draw"):
        getattr(library, name).restype = None
    library.weight_bytes.restype = number
    return library


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(first: int, count: int, multiple: int = _PANEL) -> Tensor:
    """Numbers from `first`, then -1 up to a multiple."""
    out = torch.full((_up(count, multiple),), -1)
    out[:count] = torch.arange(first, first + count)
    return out


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in pages of 2 MiB where the system has them: with small ones, finding where a page lies
    takes longer than reading what attention wants of it."""
    size = math.prod(shape) * dtype.itemsize
    room = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # A kernel without them.
            room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    begin = -whole.data_ptr() % _HUGE
    return whole[begin : begin + size].view(dtype).view(*shape)


def _at(tensor: Tensor) -> int:
    """Address of a contiguous tensor's first element."""
    return tensor.data_ptr()


# The structures of native.h.


class _Packed(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("panels", ctypes.c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm", ctypes.c_void_p),
        *((name, _Packed) for name in ("query", "keyvalue", "forward", "outward")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "dim", "inner", "ff", "vocabulary", "context")
        ),
        ("dim_stride", ctypes.c_int64),
        ("both_stride", ctypes.c_int64),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("logits", _Packed),
        *((name, ctypes.c_void_p) for name in ("cos_q", "sin_q", "cos_k", "sin_k")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("used", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tokens", "slots", "positions")),
        ("copies", ctypes.c_int64),
        ("copy", ctypes.c_void_p),
    )


class _Scratch(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("x", "normed", "fused", "both"))


_KINDS = ("inward", "attention", "outward", "norms", "logits")


class _Spent(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in _KINDS)
