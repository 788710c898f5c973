"""Adafactor in PaLM's parametrisation (Shazeer 2018; Chowdhery 2022, section 5).

No factoring: this is Adam whose step is scaled by the root mean square of the parameter itself,
with ``beta2 = 1 - k^-0.8`` (no bias correction needed) and decoupled weight decay ``lr^2``.

Departure: PaLM's decay is ``lr^2`` of the scheduled rate, as here; update clipping of the original
Adafactor is left out, because gradients are clipped already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SMALLEST_SCALE = 1e-3
"""Shazeer's epsilon_2: parameters at zero must still be able to move."""


class PalmAdafactor(torch.optim.Optimizer):
    """One parameter group per parameter, so that ZeRO keeps their scales apart."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float = 1e-2,
        beta1: float = 0.9,
        sharded: bool,
    ) -> None:
        """Take over parameters.

        Args:
            parameters: all that is trained.
            lr: step size, relative to a parameter's scale.
            beta1: decay of the mean of the updates.
            sharded: each rank has a partition of every parameter; scales are summed over ranks.
        """
        # Of a parameter that ZeRO 3 has cut already, nothing is left here but what it says of it.
        groups = [{"params": [p], "numel": getattr(p, "ds_numel", p.numel())} for p in parameters]
        super().__init__(groups, {"lr": lr, "beta1": beta1, "weight_decay": 0.0})
        self._sharded = sharded

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        zero = torch.zeros(())
        squares = [
            sum((self._own(p, g["numel"]).float().square().sum() for p in g["params"]), zero)
            for g in self.param_groups
        ]
        totals = torch.stack(squares)
        if self._sharded and dist.is_initialized():
            dist.all_reduce(totals)
        for group, total in zip(self.param_groups, totals, strict=True):
            scale = max(_SMALLEST_SCALE, float((total / group["numel"]).sqrt()))
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, scale)

    def _update(self, parameter: Tensor, group: dict[str, Any], scale: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta2 = 1.0 - float(state["step"]) ** -0.8
        gradient = parameter.grad
        assert gradient is not None
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        update = gradient / state["exp_avg_sq"].sqrt().clamp_(min=1e-30)
        state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1.0 - group["beta1"])
        lr = group["lr"]
        parameter.mul_(1.0 - lr * lr).add_(state["exp_avg"], alpha=-lr * scale)

    def _own(self, partition: Tensor, numel: int) -> Tensor:
        """Cut off a partition's padding, which ZeRO 3 leaves uninitialised."""
        if not self._sharded:
            return partition
        rank = dist.get_rank() if dist.is_initialized() else 0
        return partition.flatten()[: max(0, numel - rank * partition.numel())]
