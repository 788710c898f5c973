"""Mixed precision: weights in fp32, products in bf16.

A weight is rounded where it is used, forwards and backwards, and no rounded copy is kept between:
under ZeRO 3 that would hold all weights at once. What a product gives for the weight's gradient is
widened before it is summed over micro-batches and ranks: 256 bf16 summands lose 2 % of their sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return a tensor in fp32 at least."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``x @ weight.T`` in the dtype of x: ``[..., in] -> [..., out]``."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight)
    y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ weight.to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            weight_gradient = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return x_gradient, weight_gradient
