"""Falcon's attention by ours: the one family whose module does not ask for a function of attention.

Heads of keys and values stay as few as they are; the library's own copies them for each query head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.falcon import modeling_falcon

from common.models.pretrained.attention import NAME, attend


class FalconAttention(modeling_falcon.FalconAttention):
    """Attention with rotary positions."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[1, N, D] -> [1, N, D]``."""
        assert alibi is None and position_embeddings is not None
        fused = self.query_key_value(hidden_states)
        q, k, v = (t.transpose(1, 2) for t in self._heads(fused))
        cos, sin = position_embeddings
        q, k = modeling_falcon.apply_rotary_pos_emb(q, k, cos, sin)
        mixed, _none = attend(self, q, k, v, None)
        out: Tensor = self.dense(mixed.flatten(-2))
        return out, None

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the projection: queries ``[1, N, H, K]``, keys and values ``[1, N, G, K]``.

        Where heads share keys and values, the library's own cut indexes by lists, which are copied
        to a GPU in each layer.
        """
        if not (self.new_decoder_architecture or self.multi_query):
            heads: tuple[Tensor, Tensor, Tensor] = self._split_heads(fused)
            return heads
        grouped = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        q, k, v = grouped.split([grouped.shape[-2] - 2, 1, 1], dim=-2)
        return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)


def register() -> None:
    """Let the library's Falcon build this attention under our attention's name."""
    modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = FalconAttention
