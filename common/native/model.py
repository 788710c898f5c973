"""A decoder's weights as the kernels read them, and the pass over rows of tokens.

Which decoders these are, and what of them is computed, is `common.native.coverage`. Adapters are
merged into the weights.

Shape suffixes: N rows, W those that are wanted, D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.logprobs import Sampling
from common.models.decoder import Decoder
from common.native import library
from common.native.blocks import BlockWeights
from common.native.coverage import describe
from common.native.library import KEYS, PANEL, address_of, compiled
from common.native.panels import Panels, Spent, up
from common.pages import Pages

BLOCK = 2 * KEYS
"""Positions of a block of the cache."""


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
            decoder: one that `coverage.why_not` says nothing of.
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
        layers = 1 if one_layer else sizes.layers
        self._block_shape = (layers, 2, sizes.kv_heads, block, sizes.head_dim)
        self._cache = Pages((blocks, *self._block_shape), dtype)
        self._inner, self._keyvalue = (
            heads * sizes.head_dim for heads in (sizes.heads, 2 * sizes.kv_heads)
        )
        # Attention and SwiGLU lie side by side where one product reads both.
        mixed = self._inner if of.sequential else self._inner + of.ff
        self._strides = up(sizes.dim, 2), up(mixed, 2), up(of.ff, 2)
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
        self._panels = Panels(self._library, self._packed_size(), dtype)
        self._kept: list[Tensor] = []
        self._seconds = library.Seconds()

    @property
    def vocabulary(self) -> int:
        """Tokens that have logits."""
        return self._described.vocabulary

    @property
    def logits_rows(self) -> int:
        """Rows whose logits may stand in memory at once."""
        return self._described.logits_rows

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return self._panels.bytes

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
        self._kept = []
        self._panels.begin(spent)
        layers = (library.Layer * self._described.sizes.layers)()
        for index, weights in enumerate(self._described.blocks(decoder, adapter)):
            layers[index] = self._layer(index, weights)
        embedding, norm, head = self._described.ends(decoder)
        tied = embedding.data_ptr() == head.data_ptr()
        self._layers, model = layers, self._model
        self._place_cache()
        model.layer = ctypes.cast(layers, ctypes.POINTER(library.Layer))
        model.norm = self._address(norm)
        model.scaled_norm = self._address(norm * model.logits_scale)
        model.logits = self._panels.stretches(head)
        model.embedding = None if tied else self._address(embedding)

    def forget(self) -> None:
        """Give the memory of the weights back; they have to be taken before the next pass."""
        self._panels.forget()

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

    def _layer(self, index: int, of: BlockWeights) -> library.Layer:
        """Pack a block's weights."""
        panels, beside = self._panels, (of.down,) if of.second_D is None else ()
        layer = library.Layer(
            query=panels.below((of.query,)),
            keyvalue=panels.below((of.key, of.value)),
            forward=panels.below((of.up, of.gate), each=PANEL // 2),
            outward=panels.beside((of.out, *beside)),
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
            layer.down = panels.beside((of.down,))
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
        self, logits_NV: Tensor, sampling: Sampling, positions_N: np.ndarray, uniforms_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw as `common.logprobs.draw` of `sampling_logits`, from fp32 logits.

        Args:
            logits_NV: contiguous.
            sampling: the distribution.
            positions_N: int64, places of the tokens in their responses.
            uniforms_N: float64.

        Returns:
            int64 tokens; their fp32 log-probabilities, and those in the whole distribution
            (`Sampling.unfiltered`).
        """
        rows, vocabulary = logits_NV.shape
        endings = np.array(sampling.endings, dtype=np.int64)
        drawing = library.Drawing(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            min_tokens=sampling.min_tokens,
            count=len(endings),
            endings=endings.ctypes.data,
        )
        tokens_N = np.empty(rows, dtype=np.int64)
        logprobs_N, whole_N = np.empty((2, rows), dtype=np.float32)
        positions_N = np.ascontiguousarray(positions_N)
        self._library.draw(
            address_of(logits_NV),
            rows,
            vocabulary,
            drawing,
            positions_N.ctypes.data,
            uniforms_N.ctypes.data,
            tokens_N.ctypes.data,
            logprobs_N.ctypes.data,
            whole_N.ctypes.data,
        )
        return tokens_N, logprobs_N, whole_N

    def seconds(self) -> dict[str, float]:
        """Return the time spent so far, by kind of work."""
        kinds = [name for name, _ in library.Seconds._fields_]
        return {name: float(getattr(self._seconds, name)) for name in kinds}

    def _packed_size(self) -> int:
        """Numbers of all packed weights."""
        of = self._described
        dim, (inward, mixed, ff) = up(of.sizes.dim, PANEL), self._strides
        columns = up(self._inner, PANEL) + up(self._keyvalue, PANEL)
        columns += 2 * up(of.ff, PANEL // 2)
        block = columns * inward + dim * mixed + (dim * ff if of.sequential else 0)
        return of.sizes.layers * block + up(of.vocabulary, PANEL) * inward

    def _ensure_scratch(self, rows: int) -> None:
        """Have memory for the activations of so many rows; kept, because fresh pages cost time."""
        if rows <= self._scratch_rows:
            return
        of = self._described
        fused = up(self._inner, PANEL) + up(self._keyvalue, PANEL)
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
