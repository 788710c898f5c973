"""The forward for processors, in C, with adapters merged into the weights.

Which decoders it computes, and what of them, is `actors.generation.native_blocks`.

Shape suffixes: B rows, D width, S slots in use, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.generation import native_library
from actors.generation.forward import Step
from actors.generation.native_blocks import BlockWeights, describe
from actors.generation.native_library import KEY_BLOCK, PANEL, Packed, address_of, compiled
from common.logprobs import Sampling
from common.models.decoder import Decoder

_LARGE_PAGE = 2**21
"""Bytes of a large page."""


class NativeForward:
    """Weights, keys and values of all slots, on the processor."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        """Products and cache in the dtype of `decoder`'s parameters.

        Args:
            decoder: one that `native_blocks.why_not` says nothing of.
            slots: sequences that the cache holds.

        Raises:
            ClusterError: there is no C compiler, or it fails.
        """
        self._described = of = describe(decoder)
        sizes = of.sizes
        self._dtype = dtype = of.ends(decoder)[0].dtype
        self._library = native_library.library(compiled(sizes, of.rotary, dtype))
        self._packed_dtype = dtype if self._library.weight_bytes() == 2 else torch.float32
        context = _up(sizes.context, KEY_BLOCK)
        shape = (sizes.layers, slots, sizes.kv_heads, context, sizes.head_dim)
        self._keys, self._values = _zeros(shape, dtype), _zeros(shape, dtype)
        self._inner, self._keyvalue = (
            heads * sizes.head_dim for heads in (sizes.heads, 2 * sizes.kv_heads)
        )
        # Attention and SwiGLU lie side by side where one product reads both.
        mixed = self._inner if of.sequential else self._inner + of.ff
        self._strides = _up(sizes.dim, 2), _up(mixed, 2), _up(of.ff, 2)
        self._model = native_library.Model(
            layers=sizes.layers,
            dim=sizes.dim,
            ff=of.ff,
            vocabulary=of.vocabulary,
            context=context,
            dim_stride=self._strides[0],
            mixed_stride=self._strides[1],
            ff_stride=self._strides[2] if of.sequential else self._strides[1],
            centred=of.centred,
            eps=of.eps,
            scale=sizes.head_dim**-0.5,
        )
        self._logits_SV = _zeros((slots, of.vocabulary), torch.float32)
        self._scratch_rows = 0
        self._scratch_tensors: list[Tensor] = []
        self._scratch = native_library.Scratch()
        self._panels = _zeros((self._packed_size(),), self._packed_dtype)
        """All packed weights; those of a new version overwrite the old ones."""
        self._panels_end = 0
        self._kept: list[Tensor] = []
        self._seconds = native_library.Seconds()

    @torch.no_grad()
    def take(self, decoder: Decoder, adapters: Sequence[str]) -> None:
        """Run with the weights that a decoder has now, with its one adapter merged.

        Raises:
            TrainingError: the adapter is not finite.
        """
        (adapter,) = adapters
        # C has only addresses: what they point to must live as long as these weights are in use.
        self._panels_end, self._kept = 0, []
        layers = (native_library.Layer * self._described.sizes.layers)()
        for index, weights in enumerate(self._described.blocks(decoder, adapter)):
            layers[index] = self._layer(index, weights)
        embedding, norm, head = self._described.ends(decoder)
        self._layers = layers
        self._model.layer = ctypes.cast(layers, ctypes.POINTER(native_library.Layer))
        self._model.norm, self._model.embedding = self._address(norm), self._address(embedding)
        self._model.logits = self._packed(head, _padded(0, len(head)))

    def _layer(self, index: int, of: BlockWeights) -> native_library.Layer:
        """Pack a block's weights."""
        rows = torch.cat((of.key, of.value))
        both = torch.cat((of.up, of.gate))
        sides = [_padded(begin, len(of.up), PANEL // 2) for begin in (0, len(of.up))]
        columns = torch.stack([side.view(-1, PANEL // 2) for side in sides], dim=1).flatten()
        outward = of.out if of.second_D is not None else torch.cat((of.out, of.down), dim=1)
        layer = native_library.Layer(
            query=self._packed(of.query, _padded(0, len(of.query))),
            keyvalue=self._packed(rows, _padded(0, len(rows))),
            forward=self._packed(both, columns),
            outward=self._packed(outward, _padded(0, len(outward))),
            norm=self._address(of.norm_D),
            second=self._address(of.second_D),
            bias=self._address(of.bias),
            norm_q=self._address(of.norm_q_K),
            norm_k=self._address(of.norm_k_K),
            window=self._described.windows[index],
            keys=address_of(self._keys[index]),
            values=address_of(self._values[index]),
        )
        names = ("cos_q", "sin_q", "cos_k", "sin_k")
        for name, table in zip(names, self._described.tables[index], strict=True):
            setattr(layer, name, address_of(table))
        if of.second_D is not None:
            layer.down = self._packed(of.down, _padded(0, len(of.down)))
        return layer

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return address_of(self._kept[-1])

    def run(self, step: Step) -> Tensor:
        """fp32 logits ``[S, V]`` after the newest token of each slot, valid until the next call.

        Their memory is used again: fresh pages would cost a fiftieth of a step.
        """
        triples = [
            number
            for copy in step.copies
            for target in copy.targets
            for number in (copy.source, target, copy.positions)
        ]
        copies, count = (ctypes.c_int64 * len(triples))(*triples), step.rows.shape[1]
        first = step.rows.ctypes.data
        tokens, slots, positions = (first + 8 * count * row for row in range(3))
        rows = native_library.StepRows(
            rows=count,
            used=step.used,
            tokens=tokens,
            slots=slots,
            positions=positions,
            copies=len(triples) // 3,
            copy=ctypes.addressof(copies),
        )
        logits_SV = self._logits_SV[: step.used]
        self._ensure_scratch(count)
        self._library.forward(
            self._model, rows, self._scratch, address_of(logits_SV), self._seconds
        )
        return logits_SV

    def rest(self) -> None:
        """Keep everything: what it holds is made once."""

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        self._library.move(self._model, source, target, positions)

    def draw(
        self, logits_BV: Tensor, sampling: Sampling, uniforms_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw as `common.logprobs.draw`, from fp32 logits without a filter."""
        rows, vocabulary = logits_BV.shape
        tokens_B, logprobs_B = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.float32)
        self._library.draw(
            address_of(logits_BV),
            rows,
            vocabulary,
            sampling.temperature,
            uniforms_B.ctypes.data,
            tokens_B.ctypes.data,
            logprobs_B.ctypes.data,
        )
        return tokens_B, logprobs_B

    def seconds(self) -> dict[str, float]:
        """Return the time spent so far, by kind of work."""
        kinds = [name for name, _ in native_library.Seconds._fields_]
        return {name: float(getattr(self._seconds, name)) for name in kinds}

    def _packed_size(self) -> int:
        """Numbers of all packed weights."""
        of = self._described
        dim, (inward, mixed, ff) = _up(of.sizes.dim, PANEL), self._strides
        columns = _up(self._inner, PANEL) + _up(self._keyvalue, PANEL)
        columns += 2 * _up(of.ff, PANEL // 2)
        block = columns * inward + dim * mixed + (dim * ff if of.sequential else 0)
        return of.sizes.layers * block + _up(of.vocabulary, PANEL) * inward

    def _packed(self, weight: Tensor, columns: Tensor) -> Packed:
        """Pack rows of weights ``[any, length]`` into panels of columns."""
        weight = weight.contiguous()
        panels, inner = len(columns) // PANEL, _up(weight.shape[1], 2)
        begin, size = self._panels_end, panels * inner * PANEL
        self._panels_end += size
        to = address_of(self._panels[begin : begin + size])
        self._library.pack(
            address_of(weight), weight.shape[1], inner, address_of(columns), panels, to
        )
        return Packed(data=to, panels=panels)

    def _ensure_scratch(self, rows: int) -> None:
        """Have memory for the activations of so many rows; kept, because fresh pages cost time."""
        if rows <= self._scratch_rows:
            return
        of = self._described
        fused = _up(self._inner, PANEL) + _up(self._keyvalue, PANEL)
        x = _zeros((rows, of.sizes.dim), torch.float32)
        normed, fused_rows, mixed, ff = (
            _zeros((rows, width), self._dtype)
            for width in (self._strides[0], fused, self._strides[1], self._strides[2])
        )
        beside = mixed.view(-1)[self._inner :]
        self._scratch = native_library.Scratch(
            x=address_of(x),
            normed=address_of(normed),
            fused=address_of(fused_rows),
            mixed=address_of(mixed),
            ff=address_of(ff if of.sequential else beside),
        )
        self._scratch_tensors = [x, normed, fused_rows, mixed, ff]
        self._scratch_rows = rows


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(first: int, count: int, multiple: int = PANEL) -> Tensor:
    """Numbers from `first`, then -1 up to a multiple."""
    out = torch.full((_up(count, multiple),), -1)
    out[:count] = torch.arange(first, first + count)
    return out


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in pages of 2 MiB where the system has them.

    With small pages, finding where one lies takes longer than reading what attention needs of it.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # A kernel without them.
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % _LARGE_PAGE
    return whole[begin : begin + size].view(dtype).view(*shape)
