"""What the native forward has to know of a decoder: the shape of its blocks, and their weights.

Two kinds of block are one description: PaLM's, whose attention and SwiGLU read one norm side by
side, and Llama's, in which SwiGLU follows attention behind a norm of its own.

Shape suffixes: D width, H query heads, G key and value heads, K head width, F width of SwiGLU,
V vocabulary, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.models.decoder import Decoder, Sizes

Tables = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines and sines of queries, then of keys: fp32 ``[L, rotary / 2]`` of every position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """A block's weights with its adapter merged; norms and biases are fp32."""

    norm_D: Tensor
    second_D: Tensor | None = None
    """Before SwiGLU; None where that reads the first norm, beside attention."""
    query: Tensor
    """``[H K, D]``."""
    key: Tensor
    """``[G K, D]``."""
    value: Tensor
    """``[G K, D]``."""
    bias: Tensor | None = None
    """Of queries, keys and values: ``[(H + 2 G) K]``."""
    norm_q_K: Tensor | None = None
    norm_k_K: Tensor | None = None
    out: Tensor
    """``[D, H K]``."""
    up: Tensor
    """``[F, D]``."""
    gate: Tensor
    """``[F, D]``."""
    down: Tensor
    """``[D, F]``."""


class Description(Protocol):
    """What the native forward has to know of a decoder."""

    sizes: Sizes
    vocabulary: int
    """Tokens that have logits."""
    ff: int
    rotary: int
    """Dimensions of a head that positions turn, the first ones."""
    sequential: bool
    """Whether SwiGLU follows attention, or stands beside it."""
    centred: bool
    """Whether norms are LayerNorms; else they are RMSNorms."""
    eps: float
    """Of norms."""
    windows: list[int]
    """Positions that each layer attends to; 0 is all."""
    tables: list[Tables]
    """Of each layer."""

    def blocks(self, decoder: Decoder, adapter: str) -> Iterator[BlockWeights]:
        """Yield the weights that a decoder of this shape has now."""

    logits_scale: float
    """What the head's products are multiplied by."""
    logits_rows: int
    """Rows whose logits are made at once."""

    def ends(self, decoder: Decoder) -> tuple[Tensor, Tensor, Tensor]:
        """Return embedding and head ``[V, D]``, and between them the last norm ``[D]``, fp32."""


def first_half(table: Tensor) -> Tensor:
    """``[L, K] -> [L, K / 2]``, of a table whose halves are the same."""
    return table[:, : table.shape[-1] // 2].float().contiguous()
