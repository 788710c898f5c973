"""LoRA (Hu 2021, arXiv 2106.09685): named adapters on one frozen base.

::

    y = W x + scale B A x        A: [r, in] normal, B: [out, r] zero;  scale = alpha / r

A projection may be fused of segments (rows q | k | v | up | gate), and each segment has an adapter
of its own: one over the fused rows would tie them to the same r directions. The A of all segments
are stacked, so that they are one product.

A base carries any number of adapters under different names. Which one a forward runs with is an
argument: a name, `OFF` (the base exactly), or a name for each row of the batch. Merged weights are
always computed from the base, in fp32, and never written over it, so no error accumulates.

Shape suffixes: N rows, I inputs, O outputs, R ranks of all segments together. A and B are the
paper's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
RowSelection = Selection | Tensor
"""Likewise, or, in an `inference_copy`, int64 indices of the rows' adapters."""

_selected: ContextVar[RowSelection] = ContextVar("adapter", default=OFF)


@contextmanager
def running_with(adapter: RowSelection) -> Iterator[None]:
    """Let projections inside the block run with an adapter when they are told none.

    That is for modules of other libraries, which call their projections with nothing but an input.
    """
    token = _selected.set(adapter)
    try:
        yield
    finally:
        _selected.reset(token)


def selected(adapter: RowSelection | None) -> RowSelection:
    """Return the adapter that a projection runs with: what it is told, or `running_with`'s."""
    return _selected.get() if adapter is None else adapter


class Adapted(nn.Linear):
    """A projection, and the adapters on its segments.

    An adapter's tensors belong to the module itself (``lora_NAME_A``, ``lora_NAME_B_SEGMENT``),
    because ZeRO 3 gathers for a forward the parameters of that module, not of its children.
    """

    def __init__(self, inputs: int, segments: Mapping[str, int], *, bias: bool = False) -> None:
        """Make a projection of `segments`: names and lengths of runs of output rows, in order.

        A bias is the base's own; adapters leave it as it is.
        """
        super().__init__(inputs, sum(segments.values()), bias=bias)
        self.segments = dict(segments)
        self.settings: dict[str, LoraConfig] = {}
        """Settings of each adapter on this projection."""
        self.precision: torch.dtype | None = None
        """Dtype of products (`common.models.networks.compute_in`); None is the weight's own."""

    def forward(self, x: Tensor, adapter: RowSelection | None = None) -> Tensor:
        """``[B, ..., in] -> [B, ..., out]``, in the dtype that products run in."""
        adapter = selected(adapter)
        assert not isinstance(adapter, Tensor), "indices are for an inference copy"
        x = x.to(self.precision or self.weight.dtype)
        y = self._projected(x, adapter)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _projected(self, x: Tensor, adapter: Selection) -> Tensor:
        if isinstance(adapter, str):
            if adapter not in self.settings:
                return product(x, self.weight)
            return _apply(x, self.weight, self._active(adapter))
        if len(adapter) != len(x):
            raise ValueError(f"{len(adapter)} adapters for {len(x)} rows")
        y = product(x, self.weight)
        for name in sorted(set(adapter).intersection(self.settings)):
            rows = torch.tensor([at == name for at in adapter], device=x.device).nonzero()[:, 0]
            y = y.index_add(0, rows, self._delta(x[rows], name).to(y.dtype))
        return y

    def add(self, name: str, settings: LoraConfig, generator: torch.Generator) -> None:
        """Add an adapter: A is drawn with variance 1/in, B is zero, so that it changes nothing."""
        spans = self.reached(settings)
        if not spans:
            return
        # Trained tensors are fp32 at least, also on a base that is kept in bf16.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # They are drawn, and have memory also where the base has none yet.
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        drawn = torch.randn(len(spans) * settings.rank, self.in_features, generator=generator)
        drawn = drawn * self.in_features**-0.5
        self.register_parameter(_a(name), nn.Parameter(drawn.to(**like)))
        for segment in spans:
            zeros = torch.zeros(self.segments[segment], settings.rank, **like)
            self.register_parameter(_b(name, segment), nn.Parameter(zeros))
        self.settings[name] = settings

    def snapshot(self, source: str, name: str) -> None:
        """Keep a frozen copy of an adapter, in buffers, which ZeRO does not divide among ranks."""
        if source not in self.settings:
            return
        for tensor in self.names(source):
            copy = getattr(self, tensor).detach().clone()
            self.register_buffer(tensor.replace(_a(source)[:-1], _a(name)[:-1], 1), copy, False)
        self.settings[name] = self.settings[source]

    def drop(self, name: str) -> None:
        """Remove an adapter."""
        if name in self.settings:
            for tensor in self.names(name):
                delattr(self, tensor)
            del self.settings[name]

    def names(self, name: str) -> list[str]:
        """Return the names of an adapter's tensors: A, then B of each segment in order."""
        return [_a(name), *(_b(name, s) for s in self.reached(self.settings[name]))]

    def reached(self, settings: LoraConfig) -> dict[str, slice]:
        """Return the segments that an adapter of these settings is on, and their output rows."""
        spans, begin = dict[str, slice](), 0
        for segment, rows in self.segments.items():
            if settings.reaches(segment):
                spans[segment] = slice(begin, begin + rows)
            begin += rows
        return spans

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Merge an adapter: ``W + scale B A`` ``[out, in]``, computed in fp32 and rounded once.

        Args:
            name: the adapter's.
            weight: W, where the projection has no memory for it; None: its own.

        Raises:
            TrainingError: the adapter is not finite.
        """
        weight = self.weight.detach() if weight is None else weight
        if name not in self.settings:
            return weight
        weight_OI = weight.float().clone()
        settings = self.settings[name]
        A_RI, *Bs = (getattr(self, tensor).float() for tensor in self.names(name))
        for B, A, rows in zip(
            Bs, torch.split(A_RI, settings.rank), self.reached(settings).values(), strict=True
        ):
            weight_OI[rows].addmm_(B, A, alpha=settings.scale)
        if bool((~weight_OI.isfinite()).any().cpu()):
            raise TrainingError(f"adapter '{name}' is not finite and was not merged")
        return weight_OI.to(self.weight.dtype)

    @torch.no_grad()
    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return ``A [R, I]`` and ``scale B [O, R]`` of an adapter, on all rows of the projection.

        It has the ranks of all its segments together, and its B is block-diagonal.

        Raises:
            TrainingError: the adapter is not finite.
        """
        settings = self.settings[name]
        A_RI, *Bs = (getattr(self, tensor).float() for tensor in self.names(name))
        B_OR, begin = A_RI.new_zeros(self.out_features, len(A_RI)), 0
        for B, rows in zip(Bs, self.reached(settings).values(), strict=True):
            B_OR[rows, begin : begin + settings.rank] = settings.scale * B
            begin += settings.rank
        broken = (~A_RI.isfinite()).any() | (~B_OR.isfinite()).any()
        if bool(broken.cpu()):
            raise TrainingError(f"adapter '{name}' is not finite")
        return A_RI.to(self.weight.dtype), B_OR.to(self.weight.dtype)

    def _active(self, name: str) -> _Active:
        settings = self.settings[name]
        A_RI, *Bs = (getattr(self, tensor) for tensor in self.names(name))
        return _Active(
            spans=tuple(self.reached(settings).values()),
            scale=settings.scale,
            dropout=settings.dropout if self.training else 0.0,
            A_RI=A_RI,
            Bs=Bs,
        )

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """Return what an adapter adds, ``[..., out]``."""
        active = self._active(name)
        inner = product(F.dropout(x, active.dropout), active.A_RI).chunk(len(active.Bs), dim=-1)
        delta = x.new_zeros(*x.shape[:-1], self.out_features)
        for rows, h, B in zip(active.spans, inner, active.Bs, strict=True):
            delta[..., rows] = active.scale * product(h, B)
        return delta


@dataclass(frozen=True, slots=True, kw_only=True)
class _Active:
    """One adapter as a forward runs with it."""

    spans: tuple[slice, ...]
    """Output rows of its segments."""
    scale: float
    dropout: float
    A_RI: Tensor
    Bs: list[Tensor]
    """B of each segment ``[rows, rank]``."""


def _apply(x: Tensor, weight_OI: Tensor, adapter: _Active) -> Tensor:
    """``[..., in] -> [..., out]`` by base and adapter together."""
    x_NI = x.reshape(-1, x.shape[-1])
    # The adapter has an input of its own only where some of it is dropped.
    dropped_NI = F.dropout(x_NI, adapter.dropout) if adapter.dropout else x_NI
    y_NO: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x_NI, dropped_NI, weight_OI, adapter.spans, adapter.scale, adapter.A_RI, *adapter.Bs
    )
    return y_NO.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """Base and adapter in one, with a backward pass of its own.

    The products of the adapter add to the base's output in place, and no gradient of the base is
    computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        dropped_NI: Tensor,
        weight_OI: Tensor,
        spans: tuple[slice, ...],
        scale: float,
        A_RI: Tensor,
        *Bs: Tensor,
    ) -> Tensor:
        y_NO = F.linear(x_NI, weight_OI.to(x_NI.dtype))
        h_NR = F.linear(dropped_NI, A_RI.to(x_NI.dtype))
        for rows, h, B in zip(spans, h_NR.chunk(len(Bs), dim=1), Bs, strict=True):
            y_NO[:, rows].addmm_(h, B.T.to(x_NI.dtype), alpha=scale)
        ctx.save_for_backward(dropped_NI, weight_OI, h_NR, A_RI, *Bs)
        ctx.spans, ctx.scale, ctx.one_input = spans, scale, dropped_NI is x_NI
        return y_NO

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_NI, weight_OI, h_NR, *trained = ctx.saved_tensors
        A_RI, *Bs = (tensor.to(h_NR.dtype) for tensor in trained)
        # Transposed: products of few rows and many columns are several times as fast on a
        # processor as those of many rows and few columns.
        inner_RN = h_NR.new_empty(h_NR.shape[1], len(h_NR))
        B_gradients: list[Tensor] = []
        parts = zip(ctx.spans, h_NR.chunk(len(Bs), dim=1), inner_RN.chunk(len(Bs)), strict=True)
        for (rows, h, inner), B in zip(parts, Bs, strict=True):
            gradient = gradient_NO[:, rows]
            torch.mm(B.T, gradient.T, out=inner)
            B_gradients.append((h.T @ gradient).mul_(ctx.scale).T.to(trained[0].dtype))
        inner_RN.mul_(ctx.scale)
        x_gradient = dropped_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient_NO @ weight_OI.to(h_NR.dtype)
            if ctx.one_input:
                x_gradient.addmm_(inner_RN.T, A_RI)
            else:
                dropped_gradient = inner_RN.T @ A_RI
        A_gradient = (inner_RN @ dropped_NI).to(trained[0].dtype)
        return x_gradient, dropped_gradient, None, None, None, A_gradient, *B_gradients


def adapted(network: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield every projection that can carry adapters, with its path."""
    for path, module in network.named_modules():
        if isinstance(module, Adapted):
            yield path, module


def adapter_names(network: nn.Module) -> list[str]:
    """Return the names of the adapters that a network carries."""
    return sorted({name for _, module in adapted(network) for name in module.settings})


def require_adapters(network: nn.Module, adapter: Selection) -> None:
    """Refuse names that the network does not carry, which would run as the base.

    Raises:
        ValueError: there is no adapter of a name.
    """
    names = {adapter} if isinstance(adapter, str) else set(adapter)
    if names != {OFF}:
        known = [OFF, *adapter_names(network)]
        if unknown := sorted(names.difference(known)):
            raise ValueError(f"no adapter '{unknown[0]}' among {known}")


def _a(name: str) -> str:
    return f"lora_{name}_A"


def _b(name: str, segment: str) -> str:
    return f"lora_{name}_B_{segment}"
