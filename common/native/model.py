"""A decoder's weights as the kernels read them, and the pass over rows of tokens.

Which decoders these are, and what of them is computed, is `common.native.blocks`. Adapters are
merged into the weights.

Shape suffixes: N rows, W those that are wanted, D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.models.decoder import Decoder
from common.native import library
from common.native.blocks import BlockWeights, describe
from common.native.library import KEYS, PANEL, Packed, address_of, compiled
from common.pages import Pages

BLOCK = 2 * KEYS
"""Positions of a block of the cache."""
_STRETCH = 64 * PANEL
"""Rows of the head that are packed at once."""

Spent = Callable[[Tensor], None]
"""Told of a weight, or a part of one, that is needed no more."""


def block_bytes(decoder: Decoder, dtype: torch.dtype, block: int = BLOCK) -> int:
    """Return the bytes of a block of the cache: keys and values of all layers."""
    sizes = decoder.sizes
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * block * dtype.itemsize


class NativeModel:
    """Packed weights, and a cache of keys and values in blocks."""

    def __init__(
        self, decoder: Decoder, blocks: int, *, block: int = BLOCK, one_layer: bool = False
    ) -> None:
        """Compute and keep in the dtype of `decoder`'s parameters; weights come by `take`.

        Args:
            decoder: one that `blocks.why_not` says nothing of.
            blocks: of the cache; they take memory from their first use on.
            block: positions of one, a multiple of 16.
            one_layer: the cache has room for one layer, and every layer takes it over from the one
                before: for passes that compute whole sequences.

        Raises:
            ClusterError: there is no C compiler, or it fails.
        """
        self._described = of = describe(decoder)
        sizes = of.sizes
        self._dtype = dtype = of.ends(decoder)[0].dtype
        self._library = library.library(compiled(sizes, of.rotary, dtype))
        packed = dtype if self._library.weight_bytes() == 2 else torch.float32
        layers = 1 if one_layer else sizes.layers
        self._block_shape = (layers, 2, sizes.kv_heads, block, sizes.head_dim)
        self._cache = Pages((blocks, *self._block_shape), dtype)
        self._inner, self._keyvalue = (
            heads * sizes.head_dim for heads in (sizes.heads, 2 * sizes.kv_heads)
        )
        # Attention and SwiGLU lie side by side where one product reads both.
        mixed = self._inner if of.sequential else self._inner + of.ff
        self._strides = _up(sizes.dim, 2), _up(mixed, 2), _up(of.ff, 2)
        self._model = library.Model(
            layers=sizes.layers,
            dim=sizes.dim,
            ff=of.ff,
            vocabulary=of.vocabulary,
            block=block,
            apart=math.prod(self._block_shape),
            longest=-(-sizes.context // block),
            dim_stride=self._strides[0],
            mixed_stride=self._strides[1],
            ff_stride=self._strides[2] if of.sequential else self._strides[1],
            centred=of.centred,
            eps=of.eps,
            scale=sizes.head_dim**-0.5,
            logits_scale=of.logits_scale,
        )
        self._scratch_rows = 0
        self._scratch_tensors: list[Tensor] = []
        self._scratch = library.Scratch()
        self._panels = Pages((self._packed_size(),), packed)
        """All packed weights; those of a new version overwrite the old ones."""
        self._panels_end = 0
        self._kept: list[Tensor] = []
        self._seconds = library.Seconds()

    @property
    def vocabulary(self) -> int:
        """Tokens that have logits."""
        return self._described.vocabulary

    @property
    def logits_rows(self) -> int:
        """Rows whose logits may stand in memory at once."""
        return max(1, int(self._described.logits_mb * 2**20 / (4 * self.vocabulary)))

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return self._panels.tensor.numel() * self._panels.tensor.element_size()

    @torch.no_grad()
    def take(self, decoder: Decoder, adapter: str, spent: Spent | None = None) -> None:
        """Run with the weights that a decoder has now, with its adapter merged.

        Args:
            decoder: of the shape that this was made for.
            adapter: its name, or `lora.OFF`.
            spent: called with each of its weights that is needed no more.

        Raises:
            TrainingError: the adapter is not finite.
        """
        # C has only addresses: what they point to must live as long as these weights are in use.
        self._panels_end, self._kept = 0, []
        self._panels.prepare()
        layers = (library.Layer * self._described.sizes.layers)()
        for index, weights in enumerate(self._described.blocks(decoder, adapter)):
            layers[index] = self._layer(index, weights, spent or _keep)
        embedding, norm, head = self._described.ends(decoder)
        tied = embedding.data_ptr() == head.data_ptr()
        self._layers, model = layers, self._model
        self._place_cache()
        model.layer = ctypes.cast(layers, ctypes.POINTER(library.Layer))
        model.norm = self._address(norm)
        model.scaled_norm = self._address(norm * model.logits_scale)
        model.logits = self._head(head, spent or _keep)
        model.embedding = None if tied else self._address(embedding)

    def forget(self) -> None:
        """Give the memory of the weights back; they have to be taken before the next pass."""
        self._panels.give_back(self._panels.tensor)

    def have_blocks(self, blocks: int) -> None:
        """Have as many blocks at least; what the cache holds is lost where it grows."""
        if blocks > len(self._cache.tensor):
            self._cache = Pages((blocks, *self._block_shape), self._dtype)
            self._place_cache()

    def _place_cache(self) -> None:
        first = self._cache.tensor[0]
        for index, layer in enumerate(self._layers):
            keys, values = first[index % len(first)]
            layer.keys, layer.values = address_of(keys), address_of(values)

    def _layer(self, index: int, of: BlockWeights, spent: Spent) -> library.Layer:
        """Pack a block's weights."""
        beside = (of.down,) if of.second_D is None else ()
        layer = library.Layer(
            query=self._below((of.query,), spent),
            keyvalue=self._below((of.key, of.value), spent),
            forward=self._below((of.up, of.gate), spent, each=PANEL // 2),
            outward=self._beside((of.out, *beside), spent),
            norm=self._address(of.norm_D),
            second=self._address(of.second_D),
            bias=self._address(of.bias),
            norm_q=self._address(of.norm_q_K),
            norm_k=self._address(of.norm_k_K),
            window=self._described.windows[index],
        )
        names = ("cos_q", "sin_q", "cos_k", "sin_k")
        for name, table in zip(names, self._described.tables[index], strict=True):
            setattr(layer, name, address_of(table))
        if of.second_D is not None:
            layer.down = self._beside((of.down,), spent)
        return layer

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return address_of(self._kept[-1])

    def run(
        self,
        rows: np.ndarray,
        table: np.ndarray,
        *,
        logits_WV: Tensor | None = None,
        states_WD: Tensor | None = None,
        copies: Sequence[tuple[int, int, int]] = (),
        alone: bool = False,
    ) -> None:
        """Compute rows of tokens, and write the logits after the first ones, or their states.

        Args:
            rows: int64 ``[3 or more, N]``, contiguous: tokens, slots and positions. All earlier
                positions of a slot are in the cache, in other rows, or come by `copies`.
            table: `Blocks.table`, with blocks for all of these positions.
            logits_WV: fp32, contiguous: logits after the first rows.
            states_WD: likewise, their states; one of both is given.
            copies: blocks whose first positions are those of another, as `Blocks.share` tells.
            alone: no row reads keys and values of another, nor of a copy.
        """
        out = logits_WV if states_WD is None else states_WD
        assert out is not None
        count = rows.shape[1]
        triples = [number for copy in copies for number in copy]
        copied = (ctypes.c_int64 * len(triples))(*triples)
        tokens, slots, positions = (rows.ctypes.data + 8 * count * row for row in range(3))
        step = library.Rows(
            rows=count,
            used=len(out),
            tokens=tokens,
            slots=slots,
            positions=positions,
            table=table.ctypes.data,
            alone=alone,
            copies=len(triples) // 3,
            copy=ctypes.addressof(copied),
        )
        self._ensure_scratch(count)
        outs = (None if to is None else address_of(to) for to in (logits_WV, states_WD))
        self._library.forward(self._model, step, self._scratch, *outs, self._seconds)

    def read(self, states_ND: Tensor) -> Tensor:
        """fp32 logits ``[N, V]`` of fp32 states ``[N, D]``."""
        states_ND = states_ND.contiguous()
        logits_NV = states_ND.new_empty(len(states_ND), self.vocabulary)
        self._ensure_scratch(len(states_ND))
        self._library.read_states(
            self._model,
            address_of(states_ND),
            len(states_ND),
            self._scratch,
            address_of(logits_NV),
        )
        return logits_NV

    def draw(
        self, logits_NV: Tensor, temperature: float, uniforms_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw as `common.logprobs.draw`, from fp32 logits without a filter."""
        rows, vocabulary = logits_NV.shape
        tokens_N, logprobs_N = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.float32)
        self._library.draw(
            address_of(logits_NV),
            rows,
            vocabulary,
            temperature,
            uniforms_N.ctypes.data,
            tokens_N.ctypes.data,
            logprobs_N.ctypes.data,
        )
        return tokens_N, logprobs_N

    def seconds(self) -> dict[str, float]:
        """Return the time spent so far, by kind of work."""
        kinds = [name for name, _ in library.Seconds._fields_]
        return {name: float(getattr(self._seconds, name)) for name in kinds}

    def _packed_size(self) -> int:
        """Numbers of all packed weights."""
        of = self._described
        dim, (inward, mixed, ff) = _up(of.sizes.dim, PANEL), self._strides
        columns = _up(self._inner, PANEL) + _up(self._keyvalue, PANEL)
        columns += 2 * _up(of.ff, PANEL // 2)
        block = columns * inward + dim * mixed + (dim * ff if of.sequential else 0)
        return of.sizes.layers * block + _up(of.vocabulary, PANEL) * inward

    def _below(self, parts: Sequence[Tensor], spent: Spent, each: int = 0) -> Packed:
        """Pack weights ``[any, length]`` of one input, one below the other or in turn.

        Args:
            parts: the weights.
            spent: told of what is packed.
            each: rows of each part in turn, of parts that are of one size; 0 takes all at once.
        """
        sizes = [len(part) for part in parts]
        rows = sum(_up(size, each) for size in sizes) if each else sum(sizes)
        inner = _up(parts[0].shape[1], 2)
        packed, to = self._room(rows, inner)
        places = torch.arange(_up(rows, PANEL))
        turns = places // each if each else places
        for number, (part, begin) in enumerate(zip(parts, _before(sizes), strict=True)):
            if each:
                own = turns % len(parts) == number
                row = turns // len(parts) * each + places % each
            else:
                own, row = places >= begin, places - begin
            inside = own & (row < len(part))
            # What belongs to no part is zeros; what comes after this one writes its own.
            columns = torch.where(inside, row, torch.where(own, -1, -2))
            self._pack(part, 0, inner, inner, columns, to)
            spent(part)
        return packed

    def _beside(self, parts: Sequence[Tensor], spent: Spent) -> Packed:
        """Pack weights ``[rows, any]`` whose inputs lie side by side."""
        sizes, rows = [part.shape[1] for part in parts], len(parts[0])
        inner = _up(sum(sizes), 2)
        packed, to = self._room(rows, inner)
        for part, begin in zip(parts, _before(sizes), strict=True):
            last = part is parts[-1]
            end = inner if last else begin + part.shape[1]
            self._pack(part, begin, end, inner, _padded(rows), to)
            spent(part)
        return packed

    def _head(self, head: Tensor, spent: Spent) -> Packed:
        """Pack the largest tensor a stretch at a time: it is never here twice."""
        inner = _up(head.shape[1], 2)
        packed, to = self._room(len(head), inner)
        for begin in range(0, len(head), _STRETCH):
            some = head[begin : begin + _STRETCH]
            self._pack(some, 0, inner, inner, _padded(len(some)), to[begin * inner :])
            spent(some)
        return packed

    def _room(self, rows: int, inner: int) -> tuple[Packed, Tensor]:
        """Take the next panels for rows of weights."""
        panels, begin = _up(rows, PANEL) // PANEL, self._panels_end
        self._panels_end += panels * inner * PANEL
        to = self._panels.tensor[begin : self._panels_end]
        return Packed(data=address_of(to), panels=panels), to

    def _pack(
        self, weight: Tensor, begin: int, end: int, inner: int, columns: Tensor, to: Tensor
    ) -> None:
        weight = weight.to(self._dtype).contiguous()
        panels = len(columns) // PANEL
        sizes = weight.shape[1], begin, end, inner
        self._library.pack(address_of(weight), *sizes, address_of(columns), panels, address_of(to))

    def _ensure_scratch(self, rows: int) -> None:
        """Have memory for the activations of so many rows; kept, because fresh pages cost time."""
        if rows <= self._scratch_rows:
            return
        of = self._described
        fused = _up(self._inner, PANEL) + _up(self._keyvalue, PANEL)
        x = Pages((rows, of.sizes.dim), torch.float32).tensor
        normed, fused_rows, mixed, ff = (
            Pages((rows, width), self._dtype).tensor
            for width in (self._strides[0], fused, self._strides[1], self._strides[2])
        )
        beside = mixed.view(-1)[self._inner :]
        self._scratch = library.Scratch(
            x=address_of(x),
            normed=address_of(normed),
            fused=address_of(fused_rows),
            mixed=address_of(mixed),
            ff=address_of(ff if of.sequential else beside),
        )
        self._scratch_tensors = [x, normed, fused_rows, mixed, ff]
        self._scratch_rows = rows


def _keep(part: Tensor) -> None:
    """Let a weight be."""


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(count: int) -> Tensor:
    """Numbers 0 .. count - 1, then -1 up to whole panels."""
    out = torch.full((_up(count, PANEL),), -1)
    out[:count] = torch.arange(count)
    return out


def _before(sizes: Sequence[int]) -> list[int]:
    """Return what comes before each of some sizes."""
    return [sum(sizes[:index]) for index in range(len(sizes))]
