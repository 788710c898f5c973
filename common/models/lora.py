"""LoRA (Hu 2021, arXiv 2106.09685): named adapters on one frozen base.

::

    y = W x + scale B A x        A: [r, in] normal, B: [out, r] zero;  scale = alpha / r

The input projection of a block is fused (rows q | k | v | up | gate), and each of its segments has
an adapter of its own: one over the fused rows would tie them to the same r directions. The A of all
segments are stacked, so that they are one product.

A base carries any number of adapters under different names. Which one a forward runs with is an
argument: a name, `OFF` (the base exactly), or a name for each row of the batch. Merged weights are
always computed from the base, in fp32, and never written over it: there is nothing to drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.model import LoraConfig
from common.errors import TrainingError
from common.models.precision import product

OFF = ""
"""The base without any adapter."""

Selection = str | Sequence[str]
"""An adapter's name, or one for each row of the batch."""


class Adapted(nn.Linear):
    """A projection without bias, and the adapters on its segments.

    An adapter's tensors are the module's own (``lora_NAME_A``, ``lora_NAME_B_SEGMENT``), because
    ZeRO 3 gathers for a module's forward what is that module's, not its children's.
    """

    def __init__(self, inputs: int, segments: Mapping[str, int]) -> None:
        """`segments` names runs of output rows, in order, with their lengths."""
        super().__init__(inputs, sum(segments.values()), bias=False)
        self.segments = dict(segments)
        self.settings: dict[str, LoraConfig] = {}
        """Of each adapter that reaches this projection."""
        self.precision: torch.dtype | None = None
        """Of products (`common.models.networks.compute_in`); None is the weight's own."""

    def forward(self, x: Tensor, adapter: Selection = OFF) -> Tensor:
        """``[B, ..., in] -> [B, ..., out]``, in the dtype that products run in."""
        x = x.to(self.precision or self.weight.dtype)
        if isinstance(adapter, str):
            if adapter not in self.settings:
                return product(x, self.weight)
            found: Tensor = _apply(x, self.weight, *self._tensors(adapter, training=self.training))
            return found
        if len(adapter) != len(x):
            raise ValueError(f"{len(adapter)} adapters for {len(x)} rows")
        y = product(x, self.weight)
        for name in sorted(set(adapter).intersection(self.settings)):
            rows = torch.tensor([at == name for at in adapter], device=x.device).nonzero()[:, 0]
            y = y.index_add(0, rows, self._delta(x[rows], name).to(y.dtype))
        return y

    def add(self, name: str, settings: LoraConfig, generator: torch.Generator) -> None:
        """A new adapter: A drawn with variance 1/in, B zero, so that it changes nothing yet."""
        spans = self.reached(settings)
        if not spans:
            return
        # What is to be trained is fp32 at least, on a base that is kept in bf16 too.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        like: dict[str, Any] = {"device": self.weight.device, "dtype": dtype}
        drawn = torch.randn(len(spans) * settings.rank, self.in_features, generator=generator)
        drawn = drawn * self.in_features**-0.5
        self.register_parameter(_a(name), nn.Parameter(drawn.to(**like)))
        for segment in spans:
            zeros = torch.zeros(self.segments[segment], settings.rank, **like)
            self.register_parameter(_b(name, segment), nn.Parameter(zeros))
        self.settings[name] = settings

    def snapshot(self, source: str, name: str) -> None:
        """A frozen copy of an adapter as it is now, in buffers: ZeRO does not cut those up."""
        if source not in self.settings:
            return
        for tensor in self.names(source):
            copy = getattr(self, tensor).detach().clone()
            self.register_buffer(tensor.replace(_a(source)[:-1], _a(name)[:-1], 1), copy, False)
        self.settings[name] = self.settings[source]

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        if name in self.settings:
            for tensor in self.names(name):
                delattr(self, tensor)
            del self.settings[name]

    def names(self, name: str) -> list[str]:
        """Names of an adapter's tensors, A first, then B of each segment in order."""
        return [_a(name), *(_b(name, s) for s in self.reached(self.settings[name]))]

    def reached(self, settings: LoraConfig) -> dict[str, slice]:
        """The segments that an adapter of these settings is on, and their output rows."""
        found, begin = dict[str, slice](), 0
        for segment, rows in self.segments.items():
            if segment in settings.targets:
                found[segment] = slice(begin, begin + rows)
            begin += rows
        return found

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """``W + scale B A`` ``[out, in]``, computed in fp32 and rounded once.

        Raises:
            TrainingError: the adapter is not finite.
        """
        if name not in self.settings:
            return self.weight.detach()
        weight = self.weight.detach().float().clone()
        settings = self.settings[name]
        A, *Bs = (getattr(self, tensor).float() for tensor in self.names(name))
        for B, part, rows in zip(
            Bs, torch.split(A, settings.rank), self.reached(settings).values(), strict=True
        ):
            weight[rows].addmm_(B, part, alpha=settings.scale)
        if not weight.isfinite().all():
            raise TrainingError(f"adapter '{name}' is not finite and was not merged")
        return weight.to(self.weight.dtype)

    @torch.no_grad()
    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``A [R, in]`` and ``scale B [out, R]``: an adapter as one on all rows of the projection,
        of the ranks of its segments together, whose B is block-diagonal.

        Raises:
            TrainingError: the adapter is not finite.
        """
        settings = self.settings[name]
        A, *Bs = (getattr(self, tensor).float() for tensor in self.names(name))
        out, begin = A.new_zeros(self.out_features, len(A)), 0
        for B, rows in zip(Bs, self.reached(settings).values(), strict=True):
            out[rows, begin : begin + settings.rank] = settings.scale * B
            begin += settings.rank
        if not (A.isfinite().all() and out.isfinite().all()):
            raise TrainingError(f"adapter '{name}' is not finite")
        return A.to(self.weight.dtype), out.to(self.weight.dtype)

    def _tensors(self, name: str, *, training: bool) -> tuple[Any, ...]:
        settings = self.settings[name]
        dropout = settings.dropout if training else 0.0
        A, *Bs = (getattr(self, tensor) for tensor in self.names(name))
        return tuple(self.reached(settings).values()), settings.scale, dropout, A, *Bs

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """What an adapter adds, ``[..., out]``."""
        spans, scale, dropout, A, *Bs = self._tensors(name, training=self.training)
        inner = product(F.dropout(x, dropout), A).chunk(len(Bs), dim=-1)
        delta = x.new_zeros(*x.shape[:-1], self.out_features)
        for rows, h, B in zip(spans, inner, Bs, strict=True):
            delta[..., rows] = scale * product(h, B)
        return delta


def _apply(
    x: Tensor, weight: Tensor, spans: tuple[slice, ...], scale: float, dropout: float, *AB: Tensor
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    # The adapter has an input of its own only where some of it is dropped.
    dropped = F.dropout(flat, dropout) if dropout else flat
    y: Tensor = _LoraLinear.apply(flat, dropped, weight, spans, scale, *AB)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """Base and adapters in one, written out: what adapters add is accumulated by the products
    themselves in the base's output, and no gradient of the base is computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        spans: tuple[slice, ...],
        scale: float,
        A: Tensor,
        *Bs: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight.to(x.dtype))
        h = F.linear(dropped, A.to(x.dtype))
        for rows, part, B in zip(spans, h.chunk(len(Bs), dim=1), Bs, strict=True):
            y[:, rows].addmm_(part, B.T.to(x.dtype), alpha=scale)
        ctx.save_for_backward(dropped, weight, h, A, *Bs)
        ctx.spans, ctx.scale, ctx.one_input = spans, scale, dropped is x
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, h, *wide = ctx.saved_tensors
        A, *Bs = (tensor.to(h.dtype) for tensor in wide)
        # Transposed: products of few rows and many columns are several times as fast on a
        # processor as those of many rows and few columns.
        inner = h.new_empty(h.shape[1], len(h))
        found: list[Tensor] = []
        parts = zip(ctx.spans, h.chunk(len(Bs), dim=1), inner.chunk(len(Bs)), strict=True)
        for (rows, part, into), B in zip(parts, Bs, strict=True):
            mine = gradient[:, rows]
            torch.mm(B.T, mine.T, out=into)
            found.append((part.T @ mine).mul_(ctx.scale).T.to(wide[0].dtype))
        inner.mul_(ctx.scale)
        x_gradient = dropped_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ weight.to(h.dtype)
            if ctx.one_input:
                x_gradient.addmm_(inner.T, A)
            else:
                dropped_gradient = inner.T @ A
        A_gradient = (inner @ dropped).to(wide[0].dtype)
        return x_gradient, dropped_gradient, None, None, None, A_gradient, *found


def adapted(network: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every projection that can carry adapters, with its path."""
    for path, module in network.named_modules():
        if isinstance(module, Adapted):
            yield path, module


def adapter_names(network: nn.Module) -> list[str]:
    """The adapters that a network carries."""
    return sorted({name for _, module in adapted(network) for name in module.settings})


def require_adapters(network: nn.Module, adapter: Selection) -> None:
    """Raises ValueError for a name that the network does not carry: it would run as the base."""
    wanted = {adapter} if isinstance(adapter, str) else set(adapter)
    if wanted != {OFF}:
        here = [OFF, *adapter_names(network)]
        if unknown := sorted(wanted.difference(here)):
            raise ValueError(f"no adapter '{unknown[0]}' among {here}")


def _a(name: str) -> str:
    return f"lora_{name}_A"


def _b(name: str, segment: str) -> str:
    return f"lora_{name}_B_{segment}"
