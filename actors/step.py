"""What one call of the decoder computes, and the tables both kinds of kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.logprobs import Sampling
from common.model_config import ModelConfig
from common.palm import rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A run of a prompt without its newest token, which stands among the slots' newest."""

    slot: int
    start: int
    """Position of the first token."""
    tokens: Sequence[int]


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

    tokens: Tensor
    """int64 ``[N]``."""
    slots: Tensor
    """int64 ``[N]``."""
    positions: Tensor
    """int64 ``[N]``."""
    used: int
    chunks: Sequence[Chunk]
    copies: Sequence[Copy]


def lay_out(
    newest: Sequence[int],
    positions: Sequence[int],
    chunks: Sequence[Chunk],
    copies: Sequence[Copy],
    device: torch.device,
) -> Step:
    """The rows of a step; `newest` and `positions` have one entry per slot in use."""
    flat, slots, at = list(newest), list(range(len(newest))), list(positions)
    for chunk in chunks:
        flat += chunk.tokens
        slots += [chunk.slot] * len(chunk.tokens)
        at += range(chunk.start, chunk.start + len(chunk.tokens))
    rows = torch.tensor([flat, slots, at], device=device)
    return Step(
        tokens=rows[0],
        slots=rows[1],
        positions=rows[2],
        used=len(newest),
        chunks=chunks,
        copies=copies,
    )


class Kernels(Protocol):
    """The work between two matrix products."""

    def begin(self, step: Step) -> None: ...
    def store(self, layer: int, kv: Tensor) -> None: ...
    def attend(self, layer: int, fused: Tensor, out: Tensor) -> None: ...
    def activate(self, fused: Tensor, out: Tensor) -> None: ...
    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor: ...
    def draw(
        self, logits: Tensor, sampling: Sampling, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def rope_tables(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """``(cos_q, sin_q, cos_k, sin_k)``, fp32 ``[context, K / 2]`` of every position."""
    positions = torch.arange(config.context, device=device)
    tables = rotary(positions, config.head_dim, xpos=config.xpos, centre=config.context // 2)
    return tuple(table[:, : config.head_dim // 2].contiguous() for table in tables)
