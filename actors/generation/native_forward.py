"""The forward for processors, in C: PaLM's shape of block, with adapters merged into the weights.

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
from actors.generation.native_library import KEY_BLOCK, PANEL, Packed, address_of, compiled
from common.logprobs import Sampling
from common.models.decoder import Decoder
from common.models.palm import Block, PaLM
from common.models.rotary import rotary

_LARGE_PAGE = 2**21
"""Bytes of a large page."""


def supports(decoder: Decoder) -> bool:
    """Whether the native forward computes what this decoder does, where its weights are."""
    return isinstance(decoder, PaLM) and decoder.embedding.weight.device.type == "cpu"


class NativeForward:
    """Weights, keys and values of all slots, on the processor."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        """Products and cache in the dtype of `decoder`'s parameters.

        Raises:
            ClusterError: there is no C compiler, or it fails.
        """
        assert isinstance(decoder, PaLM)
        self._config = config = decoder.config
        self._dtype = dtype = decoder.embedding.weight.dtype
        self._library = native_library.library(compiled(decoder.sizes, dtype))
        self._packed_dtype = dtype if self._library.weight_bytes() == 2 else torch.float32
        context = _up(config.context, KEY_BLOCK)
        shape = (config.layers, slots, context, config.head_dim)
        self._keys, self._values = _zeros(shape, dtype), _zeros(shape, dtype)
        self._tables = _rotary_tables(decoder)
        self._inner = config.heads * config.head_dim
        self._ff = config.ff_mult * config.dim
        self._strides = _up(config.dim, 2), _up(self._inner + self._ff, 2)
        self._columns = self._sections()
        cos_q, sin_q, cos_k, sin_k = map(address_of, self._tables)
        self._model = native_library.Model(
            layers=config.layers,
            dim=config.dim,
            inner=self._inner,
            ff=self._ff,
            vocabulary=config.vocab_size,
            context=context,
            dim_stride=self._strides[0],
            both_stride=self._strides[1],
            cos_q=cos_q,
            sin_q=sin_q,
            cos_k=cos_k,
            sin_k=sin_k,
        )
        self._logits_SV = _zeros((slots, config.vocab_size), torch.float32)
        self._scratch_rows = 0
        self._scratch_tensors: list[Tensor] = []
        self._scratch = native_library.Scratch()
        widths = sum(map(len, self._columns)), _up(config.dim, PANEL)
        panels = config.layers * sum(map(math.prod, zip(widths, self._strides, strict=True)))
        logits = _up(config.vocab_size, PANEL) * self._strides[0]
        self._panels = _zeros((panels + logits,), self._packed_dtype)
        """All packed weights; those of a new version overwrite the old ones."""
        self._panels_end = 0
        self._weights: list[Tensor] = []
        self._seconds = native_library.Seconds()

    @torch.no_grad()
    def take(self, decoder: Decoder, adapters: Sequence[str]) -> None:
        """Run with the weights that a decoder has now, with its one adapter merged.

        Raises:
            TrainingError: the adapter is not finite.
        """
        assert isinstance(decoder, PaLM)
        (adapter,) = adapters
        query, keyvalue, forward = self._columns
        layers = (native_library.Layer * len(decoder.blocks))()
        self._panels_end, norms = 0, list[Tensor]()
        for index, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            inward = block.fused_in.merged(adapter)
            outward = torch.cat(
                (block.attn_out.merged(adapter), block.ff_out.merged(adapter)), dim=1
            )
            norms.append(block.norm.weight.float())
            layers[index] = native_library.Layer(
                norm=address_of(norms[-1]),
                query=self._packed(inward, query),
                keyvalue=self._packed(inward, keyvalue),
                forward=self._packed(inward, forward),
                outward=self._packed(outward, _padded(0, self._config.dim)),
                keys=address_of(self._keys[index]),
                values=address_of(self._values[index]),
            )
        scale = self._config.dim**-0.5 if self._config.scale_logits else 1.0
        norm, embedding = decoder.norm.weight.float() * scale, decoder.embedding.weight.detach()
        self._layers = layers
        self._model.layer = ctypes.cast(layers, ctypes.POINTER(native_library.Layer))
        self._model.norm, self._model.embedding = address_of(norm), address_of(embedding)
        self._model.logits = self._packed(embedding, _padded(0, len(embedding)))
        # C has only addresses: what they point to must live as long as these weights are in use.
        self._weights = [norm, embedding, *norms]

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

    def _sections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the input projection in the order of the panels.

        Queries, then keys and values, then the two sides of SwiGLU side by side.
        """
        inner, kv, ff, half = self._inner, 2 * self._config.head_dim, self._ff, PANEL // 2
        up = _padded(inner + kv, ff, half).view(-1, half)
        gate = _padded(inner + kv + ff, ff, half).view(-1, half)
        both = torch.stack((up, gate), dim=1).flatten()
        return _padded(0, inner), _padded(inner, kv), both

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
        fused = sum(len(columns) for columns in self._columns[:2])
        x = _zeros((rows, self._config.dim), torch.float32)
        normed = _zeros((rows, self._strides[0]), self._dtype)
        fused_rows = _zeros((rows, fused), self._dtype)
        both = _zeros((rows, self._strides[1]), self._dtype)
        self._scratch = native_library.Scratch(
            x=address_of(x),
            normed=address_of(normed),
            fused=address_of(fused_rows),
            both=address_of(both),
        )
        self._scratch_tensors, self._scratch_rows = [x, normed, fused_rows, both], rows


def _rotary_tables(decoder: PaLM) -> tuple[Tensor, ...]:
    """``(cos_q, sin_q, cos_k, sin_k)``, fp32 ``[context, K / 2]`` of every position."""
    config = decoder.config
    tables = rotary(
        torch.arange(config.context),
        config.head_dim,
        xpos=config.xpos,
        centre=config.context // 2,
    )
    return tuple(table[:, : config.head_dim // 2].contiguous() for table in tables)


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
