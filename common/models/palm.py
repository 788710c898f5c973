"""PaLM (Chowdhery 2022, arXiv 2204.02311, section 2).

One block is parallel, with one LayerNorm of scale only::

    y = x + MLP(LN(x)) + Attention(LN(x))          MLP(x) = W_out (silu(x W_gate) * (x W_up))

Attention is multi-query: h query heads share one key and one value head. Positions are rotary.
Input and output embeddings are shared and logits scaled by 1/sqrt(d). No biases, no dropout.

Shape suffixes: D width, H query heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config.model import PalmConfig
from common.devices import PROCESSOR
from common.models.attention import Attention
from common.models.decoder import Decoder, Sizes
from common.models.embedding import HeadReader, Reader, TiedEmbedding
from common.models.filling import Source, held
from common.models.lora import Adapted, RowSelection
from common.models.precision import wide
from common.models.rotary import rotary, rotate


class Norm(nn.LayerNorm):
    """LayerNorm of scale only, in fp32 whatever the dtype of its input.

    The gradient of its weight is a sum over all tokens, of which bf16 would lose most.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``, fp32 at least."""
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), None, self.eps)


class Block(nn.Module):
    """One parallel block. The input projection is fused: rows q | k | v | up | gate."""

    def __init__(self, config: PalmConfig) -> None:
        super().__init__()
        d, ff = config.dim, config.ff_mult * config.dim
        inner, self.heads = config.heads * config.head_dim, config.heads
        segments = {"q": inner, "k": config.head_dim, "v": config.head_dim, "up": ff, "gate": ff}
        self.splits = tuple(segments.values())
        self.norm = Norm(d)
        self.fused_in = Adapted(d, segments)
        self.attn_out = Adapted(inner, {"attn_out": d})
        self.ff_out = Adapted(ff, {"ff_out": d})

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, ...],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        adapter: RowSelection,
    ) -> Tensor:
        """``[..., D] -> [..., D]``.

        Args:
            x: the residual stream.
            rope: rotary tables ``[..., K]`` of the tokens' positions.
            attend: `Attention` of this layer.
            adapter: passed on to every projection.
        """
        cos_q, sin_q, cos_k, sin_k = (table.unsqueeze(-2) for table in rope)
        q, k, v, up, gate = self.fused_in(self.norm(x), adapter).split(self.splits, dim=-1)
        q = rearrange(q, "... (h k) -> ... h k", h=self.heads)
        k, v = k.unsqueeze(-2), v.unsqueeze(-2)
        mixed = attend(rotate(q, cos_q, sin_q), rotate(k, cos_k, sin_k), v)
        mixed = rearrange(mixed, "... h k -> ... (h k)")
        mlp: Tensor = self.ff_out(F.silu(gate) * up, adapter)
        out: Tensor = x + mlp + self.attn_out(mixed, adapter)
        return out


class PaLM(Decoder):
    """PaLM on the device of its parameters.

    Products run in the parameters' dtype, or in that of `compute_in`; norms and the residual
    stream in fp32 at least.
    """

    def __init__(self, config: PalmConfig) -> None:
        if config.vocab_size <= 0:
            raise ValueError("vocab_size must be set before a model is built")
        super().__init__(
            Sizes(
                dim=config.dim,
                context=config.context,
                layers=config.layers,
                heads=config.heads,
                kv_heads=1,
                head_dim=config.head_dim,
            )
        )
        self.config = config
        self.embedding = TiedEmbedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.dim)

    def first_weights(self, seed: int) -> Iterator[tuple[str, Source]]:
        """Draw kernels from N(0, 1/sqrt(fan_in)), embeddings from N(0, 1); norms are 1.

        (PaLM, section 5.)
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                yield name, held(torch.ones(parameter.shape))
                continue
            std = 1.0 if name.startswith("embedding") else parameter.shape[1] ** -0.5
            yield name, held(torch.randn(parameter.shape, generator=generator) * std)

    def states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapter: RowSelection
    ) -> Tensor:
        """Compute the final normalised states, as `Decoder.states`."""
        rope = rotary(
            positions,
            self.config.head_dim,
            xpos=self.config.xpos,
            centre=self.config.context // 2,
        )
        x = wide(self.embedding(tokens))
        for index, block in enumerate(self.blocks):
            attend = partial(attention, index)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, adapter, use_reentrant=False)
            else:
                x = block(x, rope, attend, adapter)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[..., V]`` by the tied embedding."""
        logits: Tensor = self.embedding(self._scaled(hidden), to_logits=True)
        return logits.float()

    def read(self, hidden: Tensor, read: Reader | HeadReader) -> Tensor:
        """Return what a reader makes of the logits, computed in pieces (`PalmConfig.logits_mb`)."""
        on_processor = hidden.device.type == PROCESSOR
        rows = self.config.logits_rows(self.config.vocab_size, processor=on_processor)
        if isinstance(read, HeadReader):  # which has states of its own, that nobody has scaled
            flat, rule = hidden.flatten(0, -2), self._scaled
            values: Tensor = self.embedding(flat, to_logits=True, read=read, rows=rows, rule=rule)
        else:
            flat = self._scaled(hidden).flatten(0, -2)
            values = self.embedding(flat, to_logits=True, read=read, rows=rows)
        return values.view(*hidden.shape[:-1], values.shape[-1])

    def _scaled(self, hidden: Tensor) -> Tensor:
        """Scale states, or logits."""
        return hidden * self.config.dim**-0.5 if self.config.scale_logits else hidden
