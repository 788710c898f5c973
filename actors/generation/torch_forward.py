"""The forward in PyTorch, for any decoder on any device.

It runs the decoder's own blocks. Only their attention is another one: keys and values go into a
cache, and queries attend to that.

Shape suffixes: N flat tokens, S slots in use, P prompt chunks, C tokens of the longest chunk,
L positions that can be attended to, H query heads, G key and value heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from actors.generation.forward import Chunk, Step
from common.logprobs import Sampling, draw, sampling_logits
from common.models.decoder import Decoder, over_heads
from common.models.inference import inference_copy


class TorchForward:
    """Weights, keys and values of all slots, on any device."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        """Products and cache in the dtype of `decoder`'s parameters."""
        sizes, weight = decoder.sizes, next(decoder.parameters())
        shape = (sizes.layers, slots, sizes.kv_heads, sizes.context, sizes.head_dim)
        self._keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._values = torch.zeros_like(self._keys)
        self._decoder = decoder

    def take(self, decoder: Decoder, adapters: Sequence[str]) -> None:
        """Run with the weights that a decoder has now."""
        self._decoder = inference_copy(decoder, adapters)

    @torch.no_grad()
    def run(self, step: Step) -> Tensor:
        """fp32 logits ``[S, V]`` after the newest token of each slot."""
        tokens_N, slots_N, positions_N, adapters_N = torch.from_numpy(step.rows).to(
            self._keys.device
        )
        attention = _CachedAttention(
            self._keys, self._values, slots_N, positions_N, step, self._decoder.sizes.heads
        )
        hidden = self._decoder.states(tokens_N, positions_N, attention, adapters_N)
        return self._decoder.logits(hidden[: step.used])

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :positions] = cache[:, source, :, :positions]

    def draw(
        self, logits: Tensor, sampling: Sampling, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw as `common.logprobs.draw`, from logits ``[B, V]`` without a filter."""
        uniforms_B = torch.from_numpy(uniforms).to(logits.device)
        tokens, logprobs = draw(sampling_logits(logits, sampling), uniforms_B)
        return tokens.cpu().numpy(), logprobs.cpu().numpy()


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
        """`keys` and `values` are the cache ``[layers, slots, G, context, K]``."""
        self._caches = keys, values
        self._slots_N, self._positions_N = slots_N, positions_N
        self._used, self._copies = step.used, step.copies
        self._bias = _bias(positions_N[: step.used], keys.shape[2], heads, keys.dtype)
        self._prefill = _prefill(step.chunks, keys.device) if step.chunks else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values: queries ``[N, H, K]``, keys and values ``[N, G, K]`` to ``[N, H, K]``."""
        keys, values = (cache[layer] for cache in self._caches)
        for cache, new in ((keys, k), (values, v)):
            cache[self._slots_N, :, self._positions_N] = new
            for copy in self._copies:
                source = cache[copy.source, :, : copy.positions]
                cache[copy.targets, :, : copy.positions] = source
        mixed = self._attend_newest(q[: self._used], keys, values)
        if self._prefill is None:
            return mixed
        return torch.cat((mixed, _attend_prompts(q[self._used :], keys, values, self._prefill)))

    def _attend_newest(self, q_SHK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from one token of each slot: a product per head of keys, nothing expanded."""
        groups, reach = keys.shape[1], self._bias.shape[-1]
        q = rearrange(q_SHK, "s (g h) k -> (s g) h k", g=groups)
        near, kept = (t[: len(q_SHK), :, :reach].flatten(0, 1) for t in (keys, values))
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(self._bias, q, near.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return rearrange(torch.bmm(weights, kept), "(s g) h k -> s (g h) k", g=groups)


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


def _attend_prompts(q: Tensor, keys: Tensor, values: Tensor, prefill: _Prefill) -> Tensor:
    """Attention ``[N - S, H, K]`` of prompt tokens, padded per prompt."""
    count, _, longest, reach = prefill.mask.shape
    heads = q.shape[1]
    padded = q.new_zeros(count, longest, *q.shape[1:])
    padded[prefill.rows, prefill.columns] = q
    k, v = (over_heads(t[prefill.slots, :, :reach], heads) for t in (keys, values))
    out = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, attn_mask=prefill.mask)
    return out.transpose(1, 2)[prefill.rows, prefill.columns]


def _bias(positions_S: Tensor, kv_heads: int, heads: int, dtype: torch.dtype) -> Tensor:
    """``[S G, H / G, L]`` of the newest tokens: 0, or -inf where a slot has no position yet."""
    reach = int(positions_S.max()) + 1
    absent = torch.arange(reach, device=positions_S.device) > positions_S[:, None]
    bias = torch.zeros(absent.shape, dtype=dtype, device=positions_S.device)
    bias = bias.masked_fill_(absent, float("-inf"))[:, None, None]
    return bias.expand(-1, kv_heads, heads // kv_heads, -1).flatten(0, 1)


def _prefill(chunks: Sequence[Chunk], device: torch.device) -> _Prefill:
    lengths = torch.tensor([len(chunk.tokens) for chunk in chunks])
    starts = torch.tensor([chunk.start for chunk in chunks])
    columns = torch.arange(int(lengths.max()))
    at = starts[:, None] + columns
    mask = torch.arange(int((starts + lengths).max())) <= at[..., None]
    rows, places = (columns < lengths[:, None]).nonzero(as_tuple=True)
    return _Prefill(
        rows.to(device),
        places.to(device),
        torch.tensor([chunk.slot for chunk in chunks], device=device),
        mask[:, None].to(device),
    )
