"""What one call of the decoder computes, and what both implementations of its forward share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.config.model import ModelConfig
from common.logprobs import Sampling
from common.models.rotary import rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A run of a prompt without its newest token, which stands among the slots' newest."""

    slot: int
    start: int
    """Position of the first token."""
    tokens: Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A prefix that slots share with another: its keys and values are copied, not computed.

    Copies are made in order, after the step's own keys and values are written."""

    source: int
    targets: Sequence[int]
    positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Flat rows: the newest token of slots 0 .. used - 1, then the tokens of the chunks."""

    rows: np.ndarray
    """int64 ``[4, N]``, contiguous: tokens, slots, positions, and adapters as `Delta.owners`, which
    a row's slot decides."""
    used: int
    chunks: Sequence[Chunk]
    copies: Sequence[Copy]


def lay_out(
    newest: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    chunks: Sequence[Chunk],
    copies: Sequence[Copy],
    adapters: Sequence[int] | np.ndarray | int,
) -> Step:
    """The rows of a step; `newest`, `positions` and `adapters`, where it is not one for all, have
    one entry per slot in use."""
    sizes = [len(chunk.tokens) for chunk in chunks]
    rows = np.empty((4, len(newest) + sum(sizes)), dtype=np.int64)
    end = len(newest)
    rows[0, :end], rows[1, :end], rows[2, :end] = newest, np.arange(end), positions
    rows[3, :end] = adapters
    for chunk, size in zip(chunks, sizes, strict=True):
        begin, end = end, end + size
        places = np.arange(chunk.start, chunk.start + size)
        rows[0, begin:end], rows[1, begin:end], rows[2, begin:end] = (
            chunk.tokens,
            chunk.slot,
            places,
        )
        rows[3, begin:end] = rows[3, chunk.slot]
    return Step(rows=rows, used=len(newest), chunks=chunks, copies=copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What adapters add to a product: ``B (own * (A x))``, all of them side by side, where `own` is
    1 in the directions of the row's own adapter and 0 in all others. Rows of one batch need not be
    sorted by their adapters, and the cost grows with the ranks R of all together."""

    A: Tensor
    """``[R, in]``."""
    B: Tensor
    """``[out, R]``, times the adapters' scales."""
    owners: Tensor
    """int64 ``[R]``: whose direction it is, by index in `Decoder.adapters`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Weights in the precision of the products, and adapters that are not merged into them."""

    weight: Tensor
    """``[out, in]``."""
    delta: Delta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block's weights."""

    norm: Tensor
    """fp32 ``[D]``."""
    inward: Product
    """Of ``[q + k + v + up + gate, D]``."""
    attn_out: Product
    """Of ``[D, H K]``."""
    ff_out: Product
    """Of ``[D, feed-forward]``."""


class Forward(Protocol):
    """Weights, keys and values of all slots, and the pass over them."""

    def take(self, layers: Sequence[Layer], norm: Tensor, embedding: Tensor) -> None:
        """Run with these weights from now on; `norm` is the last LayerNorm's, ``[D]`` fp32, with
        the scale of the logits in it, and `embedding` ``[V, D]``."""

    def run(self, step: Step) -> Tensor:
        """Logits ``[S, V]`` after the newest token of each slot, good until the next call."""

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""

    def draw(
        self, logits: Tensor, sampling: Sampling, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `common.logprobs.draw`, for logits ``[B, V]`` without a filter: int64 tokens and
        float32 log-probabilities ``[B]`` from float64 uniforms."""


def rope_tables(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """``(cos_q, sin_q, cos_k, sin_k)``, fp32 ``[context, K / 2]`` of every position."""
    positions = torch.arange(config.context, device=device)
    tables = rotary(positions, config.head_dim, xpos=config.xpos, centre=config.context // 2)
    return tuple(table[:, : config.head_dim // 2].contiguous() for table in tables)
