"""The kernels in PyTorch: on GPUs, and where there is no C compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.step import Chunk, Step, rope_tables
from common.logprobs import Sampling, draw, sampling_logits
from common.model_config import ModelConfig


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


class TorchKernels:
    """The work between two matrix products, on any device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, keys: Tensor, values: Tensor):
        """`keys` and `values` are the cache, ``[layers, slots, context, K]`` in `dtype`."""
        self._config = config
        self._dtype = dtype
        self._keys, self._values = keys, values
        tables = rope_tables(config, keys.device)
        self._cos_q, self._sin_q, self._cos_k, self._sin_k = tables
        self._step: Step
        self._bias: Tensor
        self._prefill: _Prefill | None = None

    def begin(self, step: Step) -> None:
        """Take in the rows of a step; all later calls until the next `begin` are for them."""
        self._step = step
        newest = step.positions[: step.used]
        reach = int(newest.max()) + 1
        hidden = torch.arange(reach, device=newest.device) > newest[:, None]
        bias = torch.zeros(hidden.shape, dtype=self._dtype, device=newest.device)
        bias = bias.masked_fill_(hidden, float("-inf"))
        self._bias = bias[:, None].expand(-1, self._config.heads, -1)
        self._prefill = _prefill(step.chunks, newest.device) if step.chunks else None

    def store(self, layer: int, kv: Tensor) -> None:
        """Write keys and values ``[N - used, 2 K]`` of the rows after the newest to the cache."""
        self._write(layer, kv, slice(self._step.used, None))

    def _write(self, layer: int, kv: Tensor, rows: slice) -> None:
        slots, at = self._step.slots[rows], self._step.positions[rows]
        k, v = kv.chunk(2, dim=-1)
        self._keys[layer][slots, at] = _rotate(k, self._cos_k[at], self._sin_k[at])
        self._values[layer][slots, at] = v

    def attend(self, layer: int, fused: Tensor, out: Tensor) -> None:
        """Rotate, write the cache, attend: ``fused [n, q + k + v + ...]`` of the first n rows, to
        the left of `out`."""
        step, heads, width = self._step, self._config.heads, self._config.head_dim
        inner, rows = heads * width, len(fused)
        keys, values = self._keys[layer], self._values[layer]
        at = step.positions[:rows]
        q = fused[:, :inner].view(rows, heads, width)
        q = _rotate(q, self._cos_q[at][:, None], self._sin_q[at][:, None])
        self._write(layer, fused[:, inner : inner + 2 * width], slice(rows))
        for copy in step.copies:
            keys[copy.targets, : copy.positions] = keys[copy.source, : copy.positions]
            values[copy.targets, : copy.positions] = values[copy.source, : copy.positions]
        reach = self._bias.shape[-1]
        near, seen = keys[: step.used, :reach], values[: step.used, :reach]
        # One key and value head: [S, H, K] x [S, K, reach] in one product, nothing expanded.
        scores = torch.baddbmm(self._bias, q[: step.used], near.transpose(1, 2), alpha=width**-0.5)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(self._dtype)
        mixed = out[:, :inner].view(rows, heads, width)
        mixed[: step.used] = torch.bmm(weights, seen)
        if self._prefill is not None and rows > step.used:
            mixed[step.used :] = self._attend_prompts(q[step.used :], keys, values, self._prefill)

    def activate(self, fused: Tensor, out: Tensor) -> None:
        """SwiGLU of the right of `fused` to the right of `out`."""
        config = self._config
        inner = config.heads * config.head_dim
        up, gate = fused[:, inner + 2 * config.head_dim :].chunk(2, dim=-1)
        torch.mul(F.silu(gate), up, out=out[:, inner:])

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
        """Add `y` to `x` (fp32 ``[N, D]``, in place) and return its LayerNorm for a product."""
        if y is not None:
            x += y
        return F.layer_norm(x, (x.shape[-1],), weight).to(self._dtype)

    def draw(self, logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """As `common.logprobs.draw`, for logits ``[B, V]`` without a filter."""
        return draw(sampling_logits(logits, sampling), uniforms)

    def _attend_prompts(self, q: Tensor, keys: Tensor, values: Tensor, prefill: _Prefill) -> Tensor:
        """Attention ``[N - S, H, K]`` of prompt tokens, padded per prompt."""
        count, _, longest, reach = prefill.mask.shape
        padded = q.new_zeros(count, longest, *q.shape[1:])
        padded[prefill.rows, prefill.columns] = q
        seen = (t[prefill.slots, :reach].unsqueeze(1) for t in (keys, values))
        k, v = (t.expand(-1, self._config.heads, -1, -1) for t in seen)
        out = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, attn_mask=prefill.mask)
        return out.transpose(1, 2)[prefill.rows, prefill.columns]


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
