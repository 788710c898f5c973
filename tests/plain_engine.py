"""`ZeroEngine` of one rank by PyTorch alone: where DeepSpeed cannot be tried, or is not installed.

What it stands for is the interface that the learner computes through. It has no sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common.metrics import require_finite
from common.models.filling import Weights, fill, place
from common.models.networks import compute_in


class PlainEngine:
    """One network in training, on one device."""

    zero_stage = 0

    def __init__(
        self,
        network: nn.Module,
        weights: Weights,
        device: str,
        dtype: torch.dtype = torch.float32,
        *,
        precision: str,
        weight_decay: float,
        max_grad_norm: float,
        eps: float,
        auxiliary: bool = False,
        **_: Any,
    ) -> None:
        """Move a network to a device; the arguments are `ZeroEngine`'s."""
        self.network, self.precision = network, precision
        parameters = dict(network.named_parameters())
        for name, source in weights:
            if name in parameters and parameters[name].is_meta:
                place(parameters[name], torch.empty(parameters[name].shape))
            fill(network, [(name, source)])
        self.device = torch.device(device)
        network.to(self.device, dtype)
        if precision == "bf16":
            compute_in(network, torch.bfloat16)
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._most = max_grad_norm

        def adamw() -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                self._trained,
                lr=1e-3,
                betas=(0.9, 0.95),
                eps=eps,
                weight_decay=weight_decay,
                fused=self.device.type == "cuda",
            )

        self._optimizer, self._other = adamw(), adamw() if auxiliary else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, where: str) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._most)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return require_finite("gradient norm", float(norm.cpu()), where)

    @contextmanager
    def auxiliary_moments(self) -> Iterator[None]:
        assert self._other is not None
        self._optimizer, self._other = self._other, self._optimizer
        try:
            yield
        finally:
            self._optimizer, self._other = self._other, self._optimizer

    def gathered(self, parameters: list[Tensor]) -> nullcontext[None]:
        return nullcontext()

    def full_state(self, *, frozen: bool = True) -> dict[str, Tensor]:
        return {
            name: tensor.detach().float().cpu()
            for name, tensor in self.network.state_dict().items()
        }


def plain(device: str, dtype: torch.dtype = torch.float32) -> Callable[..., PlainEngine]:
    """What is put in the place of `ZeroEngine` itself; what is trained is in this dtype."""

    def build(network: nn.Module, weights: Weights = (), **settings: Any) -> PlainEngine:
        return PlainEngine(network, weights, device, dtype, **settings)

    return build
