"""The embedding that is both a decoder's first layer and its output head.

Logits of a large vocabulary are made in pieces, and of each piece only what is wanted is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.precision import product, wide

Reader = Callable[[Tensor, slice], Tensor]
"""fp32 logits ``[n, V]`` of some flat positions, and which ones, to what is wanted of them
``[n, C]``."""


class _Pieces(torch.autograd.Function):
    """What a reader makes of ``states @ weight.T``, without all of that product at once.

    Written out rather than checkpointed: the weight gets one gradient, in one piece, as DeepSpeed
    wants it, and no module is called again in the backward pass, where ZeRO 3 would release it.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, read: Reader, rows: int) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.read, ctx.parts = read, _parts(len(states), rows)
        return _read_pieces(states, weight.to(states.dtype), read, ctx.parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        rounded = weight.to(states.dtype)
        states_gradient = torch.empty_like(states)
        # The pieces' gradients are summed in fp32, whatever dtype they come in.
        total = torch.zeros_like(wide(weight)) if ctx.needs_input_grad[1] else None
        for part in ctx.parts:
            logits = F.linear(states[part], rounded).float().requires_grad_()
            with torch.enable_grad():
                found = ctx.read(logits, part)
            (inner,) = torch.autograd.grad(found, logits, gradient[part])
            inner = inner.to(states.dtype)
            states_gradient[part] = inner @ rounded
            if total is not None and total.dtype == inner.dtype:
                total.addmm_(inner.T, states[part])
            elif total is not None:
                total += inner.T @ states[part]
        return states_gradient, None if total is None else total.to(weight.dtype), None, None


def _read_pieces(states: Tensor, weight: Tensor, read: Reader, parts: list[slice]) -> Tensor:
    """All that a reader makes of the logits, in one tensor.

    Written into as it comes: small tensors that were kept would lie between the blocks that logits
    leave behind, none of which would then be large enough for the next, and the heap would grow to
    the size of all logits.
    """
    out = torch.empty(0)
    for part in parts:
        found = read(F.linear(states[part], weight).float(), part)
        if not out.numel():
            out = found.new_empty(len(states), found.shape[-1])
        out[part] = found
    return out


def _parts(length: int, rows: int) -> list[slice]:
    return [slice(begin, begin + rows) for begin in range(0, length, rows)]


class TiedEmbedding(nn.Embedding):
    """Input and output embedding in one.

    Both directions go through `forward`, because ZeRO 3 gathers a parameter only for the duration
    of its own module's forward.
    """

    precision: torch.dtype | None = None
    """Of products (`common.models.networks.compute_in`); None is the weights' own."""

    def forward(
        self, x: Tensor, to_logits: bool = False, read: Reader | None = None, rows: int = 0
    ) -> Tensor:
        """Ids ``[...] -> [..., D]``, or states ``[..., D] -> [..., V]``, or, by `read` in pieces of
        `rows`, flat states ``[N, D] -> [N, C]``."""
        dtype = self.precision or self.weight.dtype
        if not to_logits:
            return super().forward(x).to(dtype)
        x = x.to(dtype)
        if read is None:
            return product(x, self.weight)
        if len(x) > rows and torch.is_grad_enabled():
            found: Tensor = _Pieces.apply(x, self.weight, read, rows)  # type: ignore[no-untyped-call]
            return found
        if len(x) > rows:
            return _read_pieces(x, self.weight.to(dtype), read, _parts(len(x), rows))
        return read(product(x, self.weight).float(), slice(0, len(x)))
