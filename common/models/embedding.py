"""The embedding that is both a decoder's first layer and its output head.

Logits of a large vocabulary are made in pieces, and a reader keeps only a few numbers of each.

Shape suffixes: N positions, D width, V vocabulary, C numbers that a reader keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.precision import product, wide

Reader = Callable[[Tensor, slice], Tensor]
"""Maps fp32 logits ``[n, V]`` of a slice of all N positions, and that slice, to ``[n, C]``."""


class _Pieces(torch.autograd.Function):
    """What a reader makes of ``states @ weight.T``, of which only a piece exists at a time.

    Written out rather than checkpointed: the weight gets one gradient, in one piece, as DeepSpeed
    wants it, and no module is called again in the backward pass, where ZeRO 3 would release it.
    """

    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, read: Reader, rows: int) -> Tensor:
        ctx.save_for_backward(states_ND, weight_VD)
        ctx.read, ctx.parts = read, _parts(len(states_ND), rows)
        return _read_pieces(states_ND, weight_VD.to(states_ND.dtype), read, ctx.parts)

    @staticmethod
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD = ctx.saved_tensors
        rounded_VD = weight_VD.to(states_ND.dtype)
        states_gradient_ND = torch.empty_like(states_ND)
        # The pieces' gradients are summed in fp32, whatever dtype they come in.
        total_VD = torch.zeros_like(wide(weight_VD)) if ctx.needs_input_grad[1] else None
        for part in ctx.parts:
            logits = F.linear(states_ND[part], rounded_VD).float().requires_grad_()
            with torch.enable_grad():
                values = ctx.read(logits, part)
            (inner,) = torch.autograd.grad(values, logits, gradient_NC[part])
            inner = inner.to(states_ND.dtype)
            states_gradient_ND[part] = inner @ rounded_VD
            if total_VD is not None and total_VD.dtype == inner.dtype:
                total_VD.addmm_(inner.T, states_ND[part])
            elif total_VD is not None:
                total_VD += inner.T @ states_ND[part]
        weight_gradient_VD = None if total_VD is None else total_VD.to(weight_VD.dtype)
        return states_gradient_ND, weight_gradient_VD, None, None


def _read_pieces(states_ND: Tensor, weight_VD: Tensor, read: Reader, parts: list[slice]) -> Tensor:
    """Gather what a reader makes of every piece of the logits in one tensor ``[N, C]``.

    Each result is copied into it at once. Small tensors that were kept would lie between the blocks
    of memory that logits leave behind, none of which would then be large enough for the next, and
    the heap would grow to the size of all logits.
    """
    out_NC = torch.empty(0)
    for part in parts:
        values = read(F.linear(states_ND[part], weight_VD).float(), part)
        if not out_NC.numel():
            out_NC = values.new_empty(len(states_ND), values.shape[-1])
        out_NC[part] = values
    return out_NC


def _parts(length: int, rows: int) -> list[slice]:
    return [slice(begin, begin + rows) for begin in range(0, length, rows)]


class TiedEmbedding(nn.Embedding):
    """Input and output embedding in one.

    Both directions go through `forward`, because ZeRO 3 gathers a parameter only for the duration
    of its own module's forward.
    """

    precision: torch.dtype | None = None
    """Dtype of products (`common.models.networks.compute_in`); None is the weights' own."""

    def forward(
        self, x: Tensor, to_logits: bool = False, read: Reader | None = None, rows: int = 0
    ) -> Tensor:
        """Embed tokens, or make logits of states.

        Args:
            x: ids ``[...]``, which become ``[..., D]``; with `to_logits` states ``[..., D]``.
            to_logits: make logits ``[..., V]``.
            read: what to make of the logits; flat states ``[N, D]`` then become ``[N, C]``.
            rows: logits that `read` is given at a time.
        """
        dtype = self.precision or self.weight.dtype
        if not to_logits:
            return super().forward(x).to(dtype)
        x = x.to(dtype)
        if read is None:
            return product(x, self.weight)
        if len(x) > rows and torch.is_grad_enabled():
            values: Tensor = _Pieces.apply(x, self.weight, read, rows)  # type: ignore[no-untyped-call]
            return values
        if len(x) > rows:
            return _read_pieces(x, self.weight.to(dtype), read, _parts(len(x), rows))
        return read(product(x, self.weight).float(), slice(0, len(x)))
