"""What networks, training and generation need of a language model, whatever its architecture.

An architecture is a subclass of `Decoder`. It computes the states of tokens of any leading shape,
and leaves to the caller what they attend to: in training to the earlier tokens of their row
(`causal_attention`), in generation to keys and values in a cache. So both run the same blocks.

Shape suffixes: B sequences, T positions, D width, H query heads, G key and value heads, K head
width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.devices import onto
from common.models.attention import Attention, causal_attention
from common.models.embedding import HeadReader, Reader
from common.models.filling import Source, Weights, fill
from common.models.lora import OFF, RowSelection, Selection, require_adapters
from common.models.packing import pack

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
    """Query heads of every block."""
    kv_heads: int
    """Heads of keys and values; each serves ``heads / kv_heads`` query heads."""
    head_dim: int


class Decoder(nn.Module, ABC):
    """A language model up to its final states, and its output head."""

    shares_prompts = False
    """Whether `hidden` takes no padding and computes a prompt of several rows once: what makes a
    micro-batch small is then other than where rows are padded (`common.batching`)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    @abstractmethod
    def first_weights(self, seed: int) -> Weights:
        """Yield the first values of all weights: drawn from a seed, or those of a checkpoint."""

    def initialise(self, seed: int) -> None:
        """Give all weights their first values."""
        fill(self, self.first_weights(seed))
        self.check()

    def check(self, sources: Mapping[str, Source] | None = None) -> None:
        """Compare a few logits with those of another implementation, where there is one.

        Args:
            sources: of the weights, where the decoder has no memory for them; None: it has them.

        Raises:
            CheckpointError: they differ by more than rounding.
        """

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

    def read(self, hidden: Tensor, read: Reader | HeadReader) -> Tensor:
        """Return what a reader makes of the logits of states ``[..., D]``: ``[..., C]``.

        Architectures with large vocabularies override this and read in pieces; those that are to
        have auxiliary phases let a `HeadReader` read their output head.

        Raises:
            TypeError: there is no head for it to read.
        """
        if isinstance(read, HeadReader):
            raise TypeError(f"{type(self).__name__} has no output head that can be read in pieces")
        flat = hidden.flatten(0, -2)
        values = read(self.logits(flat), slice(0, len(flat)))
        return values.view(*hidden.shape[:-1], values.shape[-1])

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
        prompts_B: Tensor | None = None,
        adapter: Selection = OFF,
    ) -> Tensor:
        """Compute the final normalised states ``[B, T, D]`` of whole sequences.

        What rows consist of may be on the processor, whatever the device of the weights: there it
        can be looked at without waiting for the device.

        Args:
            tokens_BT: int64; rows are left-aligned, padding on the right may hold any id.
            positions_BT: int64; default 0, 1, 2, ... per row. Packed rows restart per segment.
            segments_BT: int64; positions attend only inside their own segment (packing); padding
                is -1.
            lengths_B: int64 tokens of each row. The states of what is behind them are never read:
                those of packed rows, and where `shares_prompts`, are zeros that nothing computed.
            prompts_B: int64 tokens of each row's prompt, which is computed once for all the rows
                that begin with it (`shares_prompts`).
            adapter: name of the adapter to run with, or one for each row that is not packed.

        Raises:
            ValueError: there is no such adapter.
        """
        require_adapters(self, adapter)
        device = next(self.parameters()).device
        if self.shares_prompts or segments_BT is not None:
            packed = pack(
                tokens_BT,
                positions_BT=positions_BT,
                segments_BT=segments_BT,
                lengths_B=lengths_B,
                prompts_B=prompts_B if self.shares_prompts else None,
            ).to(device)
            flat = self.states(packed.tokens_N, packed.positions_N, packed.attention, adapter)
            return packed.unpack(flat)
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=device)[None]
        rows = onto(tokens_BT, device), onto(positions_BT, device)
        return self.states(*rows, causal_attention(), adapter)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of the next token at every position."""
        return self.logits(self.hidden(tokens_BT))
