"""The forward in PyTorch: on GPUs, and where there is no C compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.generation.forward import Chunk, Layer, Product, Step, rope_tables
from common.config.model import ModelConfig
from common.logprobs import Sampling, draw, sampling_logits


@dataclass(frozen=True, slots=True)
class _Places:
    """Where in the cache the rows of a step belong, on its device."""

    slots: Tensor
    """int64 ``[N]``."""
    positions: Tensor
    """int64 ``[N]``."""


@dataclass(frozen=True, slots=True)
class _Reach:
    """What the rows of a step may attend to."""

    bias: Tensor
    """``[S, H, reach]`` of the newest tokens: 0, or -inf where a slot has no position yet."""
    prefill: _Prefill | None
    """Of the chunks, where there are any."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Where the queries of prompt chunks stand, and what they may attend to."""

    rows: Tensor
    """int64 ``[N - S]``, row of the padded queries."""
    columns: Tensor
    slots: Tensor
    """int64 ``[P]``."""
    mask: Tensor
    """bool ``[P, 1, C, reach]``."""


class TorchForward:
    """Weights, keys and values of all slots, on any device."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, slots: int, device: torch.device
    ) -> None:
        """Products and cache in `dtype`."""
        self._config = config
        self._dtype = dtype
        shape = (config.layers, slots, config.context, config.head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        tables = rope_tables(config, device)
        self._cos_q, self._sin_q, self._cos_k, self._sin_k = tables
        self._inner = config.heads * config.head_dim
        self._kv = slice(self._inner, self._inner + 2 * config.head_dim)
        """Rows of the input projection that make keys and values."""
        self._layers: Sequence[Layer] = ()
        self._norm: Tensor
        self._embedding: Tensor

    def take(self, layers: Sequence[Layer], norm: Tensor, embedding: Tensor) -> None:
        """Run with these weights from now on."""
        self._layers, self._norm, self._embedding = layers, norm, embedding

    @torch.no_grad()
    def run(self, step: Step) -> Tensor:
        """Logits ``[S, V]``, in the dtype of the products, after the newest token of each slot."""
        device = self._keys.device
        tokens, slots, positions, adapters = torch.from_numpy(step.rows).to(device)
        at = _Places(slots, positions)
        seen = _reach(step, positions, self._config.heads, self._dtype)
        x = F.embedding(tokens, self._embedding).float()
        for index, layer in enumerate(self._layers):
            normed = self._normed(x, layer.norm)
            if index == len(self._layers) - 1 and step.used < len(x):
                # Of a prompt's earlier tokens the last layer owes later ones its keys and values,
                # and nothing else.
                kv = _product(layer.inward, normed[step.used :], adapters[step.used :], self._kv)
                self._write(index, kv, at, slice(step.used, None))
                x, normed, adapters = x[: step.used], normed[: step.used], adapters[: step.used]
            fused = _product(layer.inward, normed, adapters)
            mixed = self._attend(index, fused, step, at, seen)
            up, gate = fused[:, self._kv.stop :].chunk(2, dim=-1)
            x = x + _product(layer.attn_out, mixed, adapters)
            x = x + _product(layer.ff_out, F.silu(gate) * up, adapters)
        return F.linear(self._normed(x, self._norm), self._embedding)

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        self._keys[:, target, :positions] = self._keys[:, source, :positions]
        self._values[:, target, :positions] = self._values[:, source, :positions]

    def draw(
        self, logits: Tensor, sampling: Sampling, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `common.logprobs.draw`, for logits ``[B, V]`` without a filter."""
        uniforms_B = torch.from_numpy(uniforms).to(logits.device)
        tokens, logprobs = draw(sampling_logits(logits, sampling), uniforms_B)
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight).to(self._dtype)

    def _write(self, layer: int, kv: Tensor, places: _Places, rows: slice) -> None:
        """Rotate keys and write them and values to the cache, ``[n, 2 K]``."""
        slots, at = places.slots[rows], places.positions[rows]
        k, v = kv.chunk(2, dim=-1)
        self._keys[layer][slots, at] = _rotate(k, self._cos_k[at], self._sin_k[at])
        self._values[layer][slots, at] = v

    def _attend(
        self, layer: int, fused: Tensor, step: Step, places: _Places, seen: _Reach
    ) -> Tensor:
        """Write the cache, copy shared prefixes, attend: ``[n, q + k + v + ...]`` of the first n
        rows to ``[n, H K]``."""
        heads, width, rows = self._config.heads, self._config.head_dim, len(fused)
        keys, values = self._keys[layer], self._values[layer]
        at = places.positions[:rows]
        q = fused[:, : self._inner].view(rows, heads, width)
        q = _rotate(q, self._cos_q[at][:, None], self._sin_q[at][:, None])
        self._write(layer, fused[:, self._kv], places, slice(rows))
        for copy in step.copies:
            keys[copy.targets, : copy.positions] = keys[copy.source, : copy.positions]
            values[copy.targets, : copy.positions] = values[copy.source, : copy.positions]
        reach = seen.bias.shape[-1]
        near, kept = keys[: step.used, :reach], values[: step.used, :reach]
        # One key and value head: [S, H, K] x [S, K, reach] in one product, nothing expanded.
        scores = torch.baddbmm(seen.bias, q[: step.used], near.transpose(1, 2), alpha=width**-0.5)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(self._dtype)
        mixed = torch.bmm(weights, kept)
        if seen.prefill is not None and rows > step.used:
            prompts = self._attend_prompts(q[step.used :], keys, values, seen.prefill)
            mixed = torch.cat((mixed, prompts))
        return mixed.flatten(1)

    def _attend_prompts(self, q: Tensor, keys: Tensor, values: Tensor, prefill: _Prefill) -> Tensor:
        """Attention ``[N - S, H, K]`` of prompt tokens, padded per prompt."""
        count, _, longest, reach = prefill.mask.shape
        padded = q.new_zeros(count, longest, *q.shape[1:])
        padded[prefill.rows, prefill.columns] = q
        seen = (t[prefill.slots, :reach].unsqueeze(1) for t in (keys, values))
        k, v = (t.expand(-1, self._config.heads, -1, -1) for t in seen)
        out = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, attn_mask=prefill.mask)
        return out.transpose(1, 2)[prefill.rows, prefill.columns]


def _product(product: Product, x: Tensor, adapters: Tensor, rows: slice = slice(None)) -> Tensor:
    """Some rows of a product ``[n, in] -> [n, out]``, and what each x's adapter adds."""
    y = F.linear(x, product.weight[rows])
    delta = product.delta
    if delta is None:
        return y
    inner = F.linear(x, delta.A).masked_fill_(delta.owners != adapters[:, None], 0)
    return y.addmm_(inner, delta.B[rows].T)


def _reach(step: Step, positions: Tensor, heads: int, dtype: torch.dtype) -> _Reach:
    newest = positions[: step.used]
    reach = int(newest.max()) + 1
    hidden = torch.arange(reach, device=newest.device) > newest[:, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=newest.device)
    bias = bias.masked_fill_(hidden, float("-inf"))
    prefill = _prefill(step.chunks, newest.device) if step.chunks else None
    return _Reach(bias[:, None].expand(-1, heads, -1), prefill)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2) of the last axis; tables ``[..., K / 2]``."""
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x.dtype)


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
