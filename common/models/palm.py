"""PaLM (Chowdhery 2022, arXiv 2204.02311, section 2): the decoder and its heads.

The forward for training. Generation has one of its own, with a cache: `actors.generation.decoder`.

One block is parallel, with one LayerNorm of scale only::

    y = x + MLP(LN(x)) + Attention(LN(x))          MLP(x) = W_out (silu(x W_gate) * (x W_up))

Attention is multi-query: h query heads share one key and one value head. Positions are rotary.
Input and output embeddings are shared and logits scaled by 1/sqrt(d). No biases, no dropout.

Sequences are left-aligned (padding on the right), so causality alone keeps padding out of every
real position and no attention mask is needed, whatever the lengths in a batch.

Shape suffixes: B sequences, T positions, D width, H query heads, K head width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config.model import ModelConfig
from common.models.embedding import Reader, TiedEmbedding
from common.models.lora import OFF, Adapted, Selection, require_adapters
from common.models.precision import wide

_ROPE_BASE = 10_000.0


_XPOS_BASE = 512.0


def rotary(positions: Tensor, head_dim: int, *, xpos: bool, centre: int) -> tuple[Tensor, ...]:
    """Rotary tables (Su 2021) with xpos decay (Sun 2022), half-split layout.

    Args:
        positions: int64 ``[...]``.
        centre: position of unit scale. It cancels between queries and keys, but both must use
            the same one, so that cached keys stay valid.

    Returns:
        ``(cos_q, sin_q, cos_k, sin_k)``, fp32 ``[..., head_dim]``.
    """
    device = positions.device
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angles = positions[..., None].float() * _ROPE_BASE ** (-pair / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if not xpos:
        return cos, sin, cos, sin
    decay = (pair + 0.4 * head_dim) / (1.4 * head_dim)
    scale = decay ** ((positions[..., None].float() - centre) / _XPOS_BASE)
    scale = torch.cat((scale, scale), dim=-1)
    return cos * scale, sin * scale, cos / scale, sin / scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2) of the last axis."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


class Block(nn.Module):
    """One parallel block. The input projection is fused: rows q | k | v | up | gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, inner, ff = (
            config.dim,
            config.heads * config.head_dim,
            config.ff_mult * config.dim,
        )
        segments = {"q": inner, "k": config.head_dim, "v": config.head_dim, "up": ff, "gate": ff}
        self.splits = tuple(segments.values())
        self.norm = Norm(d)
        self.fused_in = Adapted(d, segments)
        self.attn_out = Adapted(inner, {"attn_out": d})
        self.ff_out = Adapted(ff, {"ff_out": d})

    def project(
        self, x_BTD: Tensor, rope: tuple[Tensor, ...], adapter: Selection
    ) -> tuple[Tensor, ...]:
        """Rotated queries ``[B, H, T, K]`` and keys, values ``[B, T, K]``, and the MLP's output."""
        cos_q, sin_q, cos_k, sin_k = rope
        q, k, v, up, gate = self.fused_in(self.norm(x_BTD), adapter).split(self.splits, dim=-1)
        q = rearrange(q, "b t (h k) -> b h t k", h=self.config.heads)
        q = rotate(q, cos_q.unsqueeze(-3), sin_q.unsqueeze(-3))
        return q, rotate(k, cos_k, sin_k), v, self.ff_out(F.silu(gate) * up, adapter)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, ...],
        mask: Tensor | None,
        adapter: Selection = OFF,
    ) -> Tensor:
        """Full forward; mask is a boolean ``[B, 1, T, T]`` (True = may attend) or None (causal)."""
        q, k, v, mlp = self.project(x_BTD, rope, adapter)
        k, v = (t.unsqueeze(1).expand(-1, self.config.heads, -1, -1) for t in (k, v))
        dtype = q.dtype
        if q.device.type == "cpu":
            # The backward of attention in bf16 takes three times as long there as in fp32.
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out = out.to(dtype)
        mixed = rearrange(out, "b h t k -> b t (h k)")
        out_BTD: Tensor = x_BTD + mlp + self.attn_out(mixed, adapter)
        return out_BTD


class Norm(nn.LayerNorm):
    """LayerNorm of scale only. In fp32 whatever the stream's dtype: its weight's gradient is a sum
    over all tokens, of which bf16 would lose most."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``, fp32 at least."""
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), None, self.eps)


class PaLM(nn.Module):
    """The decoder, on the device of its parameters. Products run in their dtype, or in that of
    `compute_in`; norms and the residual stream in fp32 at least, as in generation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise ValueError("vocab_size must be set before a model is built")
        self.config = config
        self.embedding = TiedEmbedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.dim)

    def initialise(self, seed: int) -> None:
        """PaLM, section 5: kernels N(0, 1/sqrt(fan_in)), embeddings N(0, 1), norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
                continue
            std = 1.0 if name.startswith("embedding") else parameter.shape[1] ** -0.5
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(noise)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        adapter: Selection = OFF,
    ) -> Tensor:
        """Final normalised states ``[B, T, D]``.

        Args:
            tokens_BT: int64; rows are left-aligned, padding on the right may hold any id.
            positions_BT: int64; default 0, 1, 2, ... per row. Packed rows restart per segment.
            segments_BT: int64; positions attend only inside their own segment (packing).
            adapter: name of the adapter to run with, or one for each row.

        Raises:
            ValueError: there is no such adapter.
        """
        require_adapters(self, adapter)
        length = tokens_BT.shape[1]
        mask = None
        if segments_BT is not None:
            same = segments_BT[:, :, None] == segments_BT[:, None, :]
            mask = same.tril()[:, None]
        if positions_BT is None:
            positions_BT = torch.arange(length, device=tokens_BT.device)[None]
        rope = self._rope(positions_BT)
        x = wide(self.embedding(tokens_BT))
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, adapter, use_reentrant=False)
            else:
                x = block(x, rope, mask, adapter)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[..., V]`` by the tied embedding."""
        if self.config.scale_logits:
            hidden = hidden * self.config.dim**-0.5
        logits: Tensor = self.embedding(hidden, to_logits=True)
        return logits.float()

    def read(self, hidden: Tensor, read: Reader) -> Tensor:
        """What a reader makes of the logits of states ``[..., D]``: ``[..., C]``, in pieces."""
        if self.config.scale_logits:
            hidden = hidden * self.config.dim**-0.5
        rows = max(1, int(self.config.logits_mb * 2**20 / (4 * self.config.vocab_size)))
        found = self.embedding(hidden.flatten(0, -2), to_logits=True, read=read, rows=rows)
        return found.view(*hidden.shape[:-1], found.shape[-1])  # type: ignore[no-any-return]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of the next token at every position."""
        return self.logits(self.hidden(tokens_BT))

    def _rope(self, positions: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        return rotary(positions, config.head_dim, xpos=config.xpos, centre=config.context // 2)
