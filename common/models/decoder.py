"""What networks, training and generation need of a language model, whatever its architecture.

An architecture is a subclass of `Decoder`. It computes the states of tokens of any leading shape,
and leaves to the caller what they attend to: in training to the earlier tokens of their row
(`causal_attention`), in generation to keys and values in a cache. So both run the same blocks.

Shape suffixes: B sequences, T positions, D width, H query heads, G key and value heads, K head
width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.embedding import Reader
from common.models.lora import OFF, RowSelection, Selection, require_adapters

DECODER = "palm"
"""Name of the decoder among a network's modules: the first part of its tensors' names in weights,
checkpoints and content hashes. The first architecture's, and kept for all: files stay readable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a decoder that heads and caches depend on."""

    dim: int
    """Width of the states."""
    context: int
    """Longest sequence, in tokens."""
    layers: int
    """Blocks with attention."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values; each serves ``heads / kv_heads`` query heads."""
    head_dim: int


class Attention(Protocol):
    """How new tokens attend, given to every block."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values: queries ``[..., H, K]``, keys and values ``[..., G, K]`` to ``[..., H, K]``.

        Positions are in queries and keys already.
        """


class Decoder(nn.Module, ABC):
    """A language model up to its final states, and its output head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Draw all weights from a seed."""

    @abstractmethod
    def states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapter: RowSelection
    ) -> Tensor:
        """Compute the final normalised states ``[..., D]``, fp32 at least.

        Args:
            tokens: int64 ``[...]``.
            positions: int64, broadcastable to ``[...]``: places of the tokens in their sequences.
            attention: what every block mixes values with.
            adapter: passed on to every projection.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[..., V]`` of states ``[..., D]``."""

    def read(self, hidden: Tensor, read: Reader) -> Tensor:
        """Return what a reader makes of the logits of states ``[..., D]``: ``[..., C]``.

        Architectures with large vocabularies override this and read in pieces.
        """
        flat = hidden.flatten(0, -2)
        values = read(self.logits(flat), slice(0, len(flat)))
        return values.view(*hidden.shape[:-1], values.shape[-1])

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        adapter: Selection = OFF,
    ) -> Tensor:
        """Compute the final normalised states ``[B, T, D]`` of whole sequences.

        Args:
            tokens_BT: int64; rows are left-aligned, padding on the right may hold any id.
            positions_BT: int64; default 0, 1, 2, ... per row. Packed rows restart per segment.
            segments_BT: int64; positions attend only inside their own segment (packing).
            adapter: name of the adapter to run with, or one for each row.

        Raises:
            ValueError: there is no such adapter.
        """
        require_adapters(self, adapter)
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return self.states(tokens_BT, positions_BT, causal_attention(segments_BT), adapter)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of the next token at every position."""
        return self.logits(self.hidden(tokens_BT))


def causal_attention(segments_BT: Tensor | None = None) -> Attention:
    """Attention of whole rows ``[B, T]``, each position to itself and those before it.

    Sequences are left-aligned, so causality alone keeps padding out of every real position.
    With `segments_BT`, positions attend only inside their own segment.
    """
    mask: Tensor | None = None
    if segments_BT is not None:
        same = segments_BT[:, :, None] == segments_BT[:, None, :]
        mask = same.tril()[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype, heads = q.dtype, q.shape[-2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = over_heads(k, heads), over_heads(v, heads)
        if q.device.type == "cpu":
            # The backward of attention in bf16 takes three times as long there as in fp32.
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.to(dtype).transpose(1, 2)

    return attend


def over_heads(kv_BGTK: Tensor, heads: int) -> Tensor:
    """Keys or values ``[B, H, T, K]`` of every query head; a single head is not copied."""
    groups = kv_BGTK.shape[1]
    return kv_BGTK.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
