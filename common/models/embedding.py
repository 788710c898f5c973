"""Output heads, and the embedding that is both a decoder's first layer and its output head.

Logits of a large vocabulary are made in pieces, and a reader keeps only a few numbers of each. Most
readers are given all logits of some positions; a `HeadReader` makes them by itself, of all
positions and some of the vocabulary.

Shape suffixes: N positions, D width, V vocabulary, C numbers that a reader keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.precision import product, wide

Part = slice | Tensor
"""Some of N positions: a stretch, or int64 indices."""

Reader = Callable[[Tensor, Part], Tensor]
"""Maps fp32 logits ``[n, V]`` of a part of all N positions, and that part, to ``[n, C]``."""


Rule = Callable[[Tensor], Tensor]
"""What becomes of logits, each by itself, before anybody reads them."""


def as_it_is(logits: Tensor) -> Tensor:
    """Most decoders' rule."""
    return logits


HeadRows = Iterator[tuple[Tensor, Tensor | None]]
"""Successive rows ``[v, D]`` of a head's weight, and the numbers ``[v]`` of its bias."""


class HeadReader(ABC):
    """Reads states and an output head, of which it makes logits as it needs them."""

    @abstractmethod
    def read(
        self, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rule: Rule, rows: int
    ) -> Tensor:
        """Return what it keeps of the logits ``rule(states @ weight.T + bias)``, ``[N, C]``.

        Args:
            states_ND: in the dtype that products run in.
            weight_VD: the head's.
            bias_V: likewise.
            rule: on fp32 logits.
            rows: it may hold so many positions times V logits at a time, cut as it likes.
        """

    @abstractmethod
    def at(self, places: Tensor) -> HeadReader:
        """Return the same for some of the positions."""


class _Pieces(torch.autograd.Function):
    """What a reader makes of ``states @ weight.T + bias``, of which only a piece exists at a time.

    Written out rather than checkpointed: the weight gets one gradient, in one piece, as DeepSpeed
    wants it, and no module is called again in the backward pass, where ZeRO 3 would release it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        read: Reader,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(states_ND, weight_VD, bias_V)
        ctx.read, ctx.parts = read, _parts(len(states_ND), rows)
        return _read_pieces(states_ND, *_rounded(weight_VD, bias_V, states_ND), read, ctx.parts)

    @staticmethod
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD, bias_V = ctx.saved_tensors
        rounded_VD, rounded_V = _rounded(weight_VD, bias_V, states_ND)
        states_gradient_ND = torch.empty_like(states_ND)
        # The pieces' gradients are summed in fp32, whatever dtype they come in.
        total_VD = torch.zeros_like(wide(weight_VD)) if ctx.needs_input_grad[1] else None
        total_V = torch.zeros_like(wide(bias_V)) if ctx.needs_input_grad[2] else None
        for part in ctx.parts:
            logits = _piece(states_ND[part], rounded_VD, rounded_V).float().requires_grad_()
            with torch.enable_grad():
                values = ctx.read(logits, part)
            (inner,) = torch.autograd.grad(values, logits, gradient_NC[part])
            if total_V is not None:
                total_V += inner.sum(0)
            inner = inner.to(states_ND.dtype)
            states_gradient_ND[part] = inner @ rounded_VD
            if total_VD is not None and total_VD.dtype == inner.dtype:
                total_VD.addmm_(inner.T, states_ND[part])
            elif total_VD is not None:
                total_VD += inner.T @ states_ND[part]
        weight_gradient_VD = None if total_VD is None else total_VD.to(weight_VD.dtype)
        bias_gradient_V = None if total_V is None else total_V.to(bias_V.dtype)
        return states_gradient_ND, weight_gradient_VD, bias_gradient_V, None, None


def _rounded(
    weight_VD: Tensor, bias_V: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    return weight_VD.to(like.dtype), None if bias_V is None else bias_V.to(like.dtype)


def _read_pieces(
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    read: Reader,
    parts: list[slice],
) -> Tensor:
    """Gather what a reader makes of every piece of the logits in one tensor ``[N, C]``.

    Each result is copied into it at once. Small tensors that were kept would lie between the blocks
    of memory that logits leave behind, none of which would then be large enough for the next, and
    the heap would grow to the size of all logits.
    """
    out_NC = torch.empty(0)
    for part in parts:
        values = read(_piece(states_ND[part], weight_VD, bias_V).float(), part)
        if not out_NC.numel():
            out_NC = values.new_empty(len(states_ND), values.shape[-1])
        out_NC[part] = values
    return out_NC


def logits_of(states_ND: Tensor, rows_vD: Tensor, numbers_v: Tensor | None) -> Tensor:
    """fp32 logits ``[N, v]`` of some of the vocabulary; products run in the dtype of the states."""
    return wide(_piece(states_ND, *_rounded(rows_vD, numbers_v, states_ND)))


def _piece(states: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return logits that are rounded as those of `_logits`, to the last bit."""
    logits = F.linear(states, weight_VD)
    return logits if bias_V is None else logits.add_(bias_V)


def _parts(length: int, rows: int) -> list[slice]:
    return [slice(begin, begin + rows) for begin in range(0, length, rows)]


def read_logits(
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    reader: Reader | HeadReader,
    rows: int,
    rule: Rule = as_it_is,
) -> Tensor:
    """Return what a reader makes of logits ``[N, V]``, ``[N, C]``, of `rows` of them at a time.

    Products run in the dtype of the states.
    """
    if isinstance(reader, HeadReader):
        return reader.read(states_ND, weight_VD, bias_V, rule, rows)

    def read(logits: Tensor, part: Part) -> Tensor:
        return reader(rule(logits), part)

    if len(states_ND) <= rows:
        return read(_logits(states_ND, weight_VD, bias_V).float(), slice(0, len(states_ND)))
    if torch.is_grad_enabled():
        values: Tensor = _Pieces.apply(  # type: ignore[no-untyped-call]
            states_ND, weight_VD, bias_V, read, rows
        )
        return values
    parts = _parts(len(states_ND), rows)
    return _read_pieces(states_ND, *_rounded(weight_VD, bias_V, states_ND), read, parts)


def _logits(states: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = product(states, weight_VD)
    return logits if bias_V is None else logits + bias_V.to(logits.dtype)


class OutputHead(nn.Linear):
    """An output head of its own."""

    precision: torch.dtype | None = None
    """Dtype of products (`common.models.networks.compute_in`); None is the weights' own."""

    def forward(
        self,
        x: Tensor,
        read: Reader | HeadReader | None = None,
        rows: int = 0,
        vocabulary: int | None = None,
        rule: Rule = as_it_is,
    ) -> Tensor:
        """Make logits ``[..., V]`` of states ``[..., D]``.

        Args:
            x: the states.
            read: what to make of the logits; flat states ``[N, D]`` then become ``[N, C]``.
            rows: logits that `read` is given at a time.
            vocabulary: the first tokens, which alone have logits; None is all.
            rule: of the logits that `read` is given.
        """
        x = x.to(self.precision or self.weight.dtype)
        weight, bias = _first(self.weight, vocabulary), _first(self.bias, vocabulary)
        if read is None:
            return _logits(x, weight, bias)
        return read_logits(x, weight, bias, read, rows, rule)


class TiedEmbedding(nn.Embedding):
    """Input and output embedding in one.

    Both directions go through `forward`, because ZeRO 3 gathers a parameter only for the duration
    of its own module's forward.
    """

    precision: torch.dtype | None = None
    """Dtype of products (`common.models.networks.compute_in`); None is the weights' own."""

    def reset_parameters(self) -> None:
        """Draw first values; none on the meta device, where PyTorch imports its compiler for it."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(
        self,
        x: Tensor,
        to_logits: bool = False,
        read: Reader | HeadReader | None = None,
        rows: int = 0,
        vocabulary: int | None = None,
        rule: Rule = as_it_is,
    ) -> Tensor:
        """Embed tokens, or make logits of states.

        Args:
            x: ids ``[...]``, which become ``[..., D]``; with `to_logits` states ``[..., D]``.
            to_logits: make logits ``[..., V]``.
            read: as in `OutputHead`.
            rows: as in `OutputHead`.
            vocabulary: as in `OutputHead`.
            rule: as in `OutputHead`.
        """
        dtype = self.precision or self.weight.dtype
        if not to_logits:
            return super().forward(x).to(dtype)
        x, weight = x.to(dtype), _first(self.weight, vocabulary)
        if read is None:
            return product(x, weight)
        return read_logits(x, weight, None, read, rows, rule)


def output_head(decoder: nn.Module) -> OutputHead | TiedEmbedding:
    """Return the module whose products become a decoder's logits."""
    found = [m for m in decoder.modules() if isinstance(m, OutputHead | TiedEmbedding)]
    return next((head for head in found if isinstance(head, OutputHead)), found[0])


@overload
def _first(rows: Tensor, count: int | None) -> Tensor: ...


@overload
def _first(rows: Tensor | None, count: int | None) -> Tensor | None: ...


def _first(rows: Tensor | None, count: int | None) -> Tensor | None:
    return rows if rows is None or count in (None, len(rows)) else rows[:count]
