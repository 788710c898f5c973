"""The forward in PyTorch, for any decoder on any device.

It runs the decoder's own blocks. Only their attention is another one: keys and values go into a
cache, and queries attend to that. Steps without a prompt are replayed from graphs where those are
to be had (`actors.generation.graphs`).

Shape suffixes: N flat tokens, S slots in use, P prompt chunks, C tokens of the longest chunk,
L positions that can be attended to, H query heads, G key and value heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from actors.generation.forward import Chunk, Step, lay_out
from actors.generation.graphs import Graphs, coarse
from common.devices import Record, onto
from common.logprobs import Sampling, draw, logprobs_at, sampling_logits
from common.models.attention import PLAIN, Mixing, capped, masked_attention
from common.models.decoder import Decoder, Sizes
from common.models.inference import inference_copy, weight_bytes
from common.native.panels import Spent

_BLOCK = 64
"""Positions by which what is attended to grows and shrinks, at least."""


class _Cache:
    """Keys or values of all layers and slots, in as many positions as a step attends to.

    A product of many small bf16 matrices first copies those that do not lie one right behind the
    other, which takes longer than the product. So slots are as long as the step needs, and not as
    the context; they are laid out anew when that changes. It is a function of the step alone, for
    it may show in the last bits of what is sampled.
    """

    def __init__(self, sizes: Sizes, slots: int, like: Tensor) -> None:
        """Hold `slots` whole contexts, in the dtype and on the device of `like`."""
        self._context, self._shape = sizes.context, (slots, sizes.kv_heads, sizes.head_dim)
        numbers = slots * sizes.kv_heads * sizes.context * sizes.head_dim
        self._all = sizes.layers, numbers
        self._like = like.new_empty(0)
        self._flat = self._like
        self.length = min(_BLOCK, sizes.context)
        """Positions of a slot that have room."""
        self.peak = 0
        """Bytes that were in use at most."""

    def take(self) -> None:
        """Take the memory, where it is not taken."""
        if self._flat is self._like:
            self._flat = self._like.new_zeros(self._all)

    def release(self) -> None:
        """Give the memory back, and forget what it holds."""
        self._flat = self._like

    def fit(self, positions: int, used: int) -> None:
        """Make room for so many positions of each slot; the first `used` keep what they hold."""
        length = min(self._context, coarse(positions, _BLOCK))
        slots, groups, width = self._shape
        numbers = self._all[0] * slots * groups * length * width
        self.peak = max(self.peak, numbers * self._like.element_size())
        if length == self.length:
            return
        before, self.length, kept = self.view(), length, min(length, self.length)
        for old, new in zip(before, self.view(), strict=True):
            new[:used, :, :kept] = old[:used, :, :kept].clone()

    def view(self) -> Tensor:
        """``[layers, slots, G, L, K]``, until the next `fit`."""
        slots, groups, width = self._shape
        numbers = slots * groups * self.length * width
        held: Tensor = self._flat[:, :numbers].unflatten(1, (slots, groups, self.length, width))
        return held


class TorchForward:
    """Weights, keys and values of all slots, on any device."""

    def __init__(
        self, decoder: Decoder, slots: int, recorder: Callable[[], Record] | None = None
    ) -> None:
        """Products and cache in the dtype of `decoder`'s parameters.

        Args:
            decoder: of the shape and on the device that is run.
            slots: whole contexts that are held.
            recorder: begins recordings of steps without a prompt, which are then of a few sizes.
        """
        weight, sizes = next(decoder.parameters()), decoder.sizes
        self._caches = [_Cache(sizes, slots, weight) for _ in ("keys", "values")]
        self.slots = slots
        self._device = weight.device
        self._decoder = decoder
        self.graphs: Graphs | None = None
        if recorder is not None:
            self.graphs = Graphs(recorder, weight.dtype)
            self._rows = torch.zeros(4, slots, dtype=torch.int64, device=self._device)
            self._states = torch.zeros(slots, sizes.dim, device=self._device)

    def take(self, decoder: Decoder, adapters: Sequence[str], spent: Spent | None = None) -> None:
        """Run with the weights that a decoder has now; they stay in use."""
        self._decoder = inference_copy(decoder, adapters)
        self._forget_graphs()

    @torch.no_grad()
    def run(self, step: Step) -> Tensor:
        """fp32 logits ``[S, V]`` after the newest token of each slot."""
        for cache in self._caches:
            cache.take()
            cache.fit(int(step.rows[2].max()) + 1, step.used)
        if self.graphs is None or step.chunks or step.copies:
            states_ND = self._computed(onto(torch.from_numpy(step.rows), self._device), step)
        else:
            states_ND = self._replayed(self.graphs, step)
        return self._decoder.logits(states_ND[: step.used])

    def _computed(self, rows_4N: Tensor, step: Step) -> Tensor:
        tokens_N, slots_N, positions_N, adapters_N = rows_4N
        keys, values = (cache.view() for cache in self._caches)
        attention = _CachedAttention(
            keys, values, slots_N, positions_N, step, self._decoder.sizes.heads
        )
        return self._decoder.states(tokens_N, positions_N, attention, adapters_N)

    def _replayed(self, graphs: Graphs, step: Step) -> Tensor:
        """Do a step of one of a few sizes; rows are filled up by slots that are not in use."""
        count = min(self.slots, coarse(step.used, 1))
        filled = lay_out([0] * count, [0] * count, (), (), 0)
        filled.rows[:, : step.used] = step.rows
        self._rows[:, :count] = onto(torch.from_numpy(filled.rows), self._device)

        def compute() -> Tensor:
            return self._states[:count].copy_(self._computed(self._rows[:, :count], filled))

        return graphs.run((count, self._caches[0].length), compute)

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.forget()

    def forget(self) -> None:
        """Keep everything: weights are the decoder's."""

    def needed(self, positions: int, shared: int) -> int:
        """Return 0: every slot has room for a whole context."""
        return 0

    def fits(self, wanted: int, reserved: np.ndarray) -> bool:
        """Return True, likewise."""
        return True

    def memory(self) -> dict[str, int]:
        """Return bytes of the weights, and what keys and values took at most."""
        peak = sum(cache.peak for cache in self._caches)
        return {"weights": weight_bytes(self._decoder), "cache": peak}

    def rest(self) -> None:
        """Give back the memory of keys and values until the next step, and of graphs over it."""
        self._forget_graphs()
        for cache in self._caches:
            cache.release()

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        for cache in self._caches:
            held = cache.view()
            held[:, target, :, :positions] = held[:, source, :, :positions]

    def clear(self, slot: int) -> None:
        """Do nothing: what comes into the slot next is written over it."""

    def draw(
        self, logits: Tensor, sampling: Sampling, positions: np.ndarray, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a token per row, as `Forward.draw`."""
        places_B, uniforms_B = (
            torch.from_numpy(x).to(logits.device) for x in (positions, uniforms)
        )
        kept = sampling_logits(logits, sampling, positions=places_B)
        tokens_B, logprobs_B = draw(kept, uniforms_B)
        if not sampling.filters:
            tokens, logprobs = _on_processor(tokens_B, logprobs_B)
            return tokens, logprobs, logprobs
        whole_B = logprobs_at(logits, tokens_B, sampling.unfiltered, places_B)
        tokens, logprobs, whole = _on_processor(tokens_B, logprobs_B, whole_B)
        return tokens, logprobs, whole


def _on_processor(tokens_B: Tensor, *columns: Tensor) -> tuple[np.ndarray, ...]:
    """Return int64 tokens and float32 columns, copied from their device all at once.

    This is the one place in a step that waits for the device.
    """
    together = torch.stack([t.double() for t in (tokens_B, *columns)]).cpu().numpy()
    return together[0].astype(np.int64), *(column.astype(np.float32) for column in together[1:])


class _CachedAttention:
    """`Attention` of one step: keys and values are stored, and queries attend to what is stored."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        slots_N: Tensor,
        positions_N: Tensor,
        step: Step,
        heads: int,
    ) -> None:
        """`keys` and `values` are the caches ``[layers, slots, G, L, K]``."""
        self._caches = keys, values
        self._slots_N, self._positions_N = slots_N, positions_N
        self._step, self._heads = step, heads
        self._bias: dict[int | None, Tensor] = {}
        self._prefill: dict[int | None, _Prefill] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing = PLAIN
    ) -> Tensor:
        """Mix values: queries ``[N, H, K]``, keys and values ``[N, G, K]`` to ``[N, H, K]``."""
        keys, values = (cache[layer] for cache in self._caches)
        q = q.to(keys.dtype)
        for cache, new in ((keys, k), (values, v)):
            cache[self._slots_N, :, self._positions_N] = new.to(cache.dtype)
            for copy in self._step.copies:
                source = cache[copy.source, :, : copy.positions]
                cache[copy.targets, :, : copy.positions] = source
        used = self._step.used
        mixed = self._attend_newest(q[:used], keys, values, mixing)
        if self._step.chunks:
            if mixing.window not in self._prefill:
                prefill = _prefill(self._step.chunks, mixing.window, keys.device)
                self._prefill[mixing.window] = prefill
            prefill = self._prefill[mixing.window]
            prompts = _attend_prompts(q[used:], keys, values, mixing, prefill)
            mixed = torch.cat((mixed, prompts))
        return mixed

    def _attend_newest(self, q_SHK: Tensor, keys: Tensor, values: Tensor, mixing: Mixing) -> Tensor:
        """Attend from one token of each slot: a product per head of keys, nothing expanded."""
        groups = keys.shape[1]
        bias = self._bias_of(mixing.window, keys)
        q = rearrange(q_SHK, "s (g h) k -> (s g) h k", g=groups)
        near, kept = (t[: len(q_SHK)].flatten(0, 1) for t in (keys, values))
        scale = q.shape[-1] ** -0.5 if mixing.scale is None else mixing.scale
        if mixing.softcap is None:
            scores = torch.baddbmm(bias, q, near.transpose(1, 2), alpha=scale)
        else:
            scores = capped(torch.bmm(q, near.transpose(1, 2)) * scale, mixing.softcap) + bias
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return rearrange(torch.bmm(weights, kept), "(s g) h k -> s (g h) k", g=groups)

    def _bias_of(self, window: int | None, keys: Tensor) -> Tensor:
        if window not in self._bias:
            newest = self._positions_N[: self._step.used]
            self._bias[window] = _bias(newest, window, keys, self._heads)
        return self._bias[window]


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Where the queries of prompt chunks stand, and what they may attend to."""

    rows: Tensor
    """int64 ``[N - S]``, chunk of each query."""
    columns: Tensor
    """int64 ``[N - S]``, its place in the chunk."""
    slots: Tensor
    """int64 ``[P]``."""
    mask: Tensor
    """bool ``[P, 1, C, L]``."""


def _attend_prompts(
    q: Tensor, keys: Tensor, values: Tensor, mixing: Mixing, prefill: _Prefill
) -> Tensor:
    """Attention ``[N - S, H, K]`` of prompt tokens, padded per prompt."""
    count, _, longest, reach = prefill.mask.shape
    padded = q.new_zeros(count, longest, *q.shape[1:])
    padded[prefill.rows, prefill.columns] = q
    k, v = (t[prefill.slots, :, :reach] for t in (keys, values))
    out = masked_attention(padded.transpose(1, 2), k, v, mixing, prefill.mask)
    return out.transpose(1, 2)[prefill.rows, prefill.columns]


def _bias(positions_S: Tensor, window: int | None, keys: Tensor, heads: int) -> Tensor:
    """``[S G, H / G, L]`` of the newest tokens: 0, or -inf where there is nothing to attend to."""
    _, kv_heads, length, _ = keys.shape
    places = torch.arange(length, device=positions_S.device)
    absent = places > positions_S[:, None]
    if window is not None:
        absent |= places <= positions_S[:, None] - window
    bias = torch.zeros(absent.shape, dtype=keys.dtype, device=positions_S.device)
    bias = bias.masked_fill_(absent, float("-inf"))[:, None, None]
    return bias.expand(-1, kv_heads, heads // kv_heads, -1).flatten(0, 1)


def _prefill(chunks: Sequence[Chunk], window: int | None, device: torch.device) -> _Prefill:
    lengths = torch.tensor([len(chunk.tokens) for chunk in chunks])
    starts = torch.tensor([chunk.start for chunk in chunks])
    columns = torch.arange(int(lengths.max()))
    at = starts[:, None] + columns
    places = torch.arange(int((starts + lengths).max()))
    mask = places <= at[..., None]
    if window is not None:
        mask &= places > at[..., None] - window
    rows, within = (columns < lengths[:, None]).nonzero(as_tuple=True)
    return _Prefill(
        rows.to(device),
        within.to(device),
        torch.tensor([chunk.slot for chunk in chunks], device=device),
        mask[:, None].to(device),
    )
