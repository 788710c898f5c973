"""A decoder for generation: its modules and weights, with projections that only compute forwards.

Shape suffixes: N rows of tokens, I inputs, O outputs, R ranks of all adapters together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.decoder import Decoder
from common.models.lora import OFF, Adapted, RowSelection, adapted, selected


class _Rounding:
    """Inputs of projections in their dtype; one that several projections read is rounded once."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        last = self._last
        if last is None or last[0] is not x or last[1].dtype != dtype:
            last = self._last = x, x.to(dtype)
        return last[1]


_rounded = _Rounding()


class MergedProjection(nn.Module):
    """A projection whose weight has an adapter in it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor, adapter: RowSelection | None = None) -> Tensor:
        """``[..., in] -> [..., out]``; `adapter` is not read."""
        return F.linear(_rounded(x, self.weight.dtype), self.weight, self.bias)


class MixedProjection(nn.Module):
    """A projection that computes each row's own adapter beside the weight.

    ``y = W x + B (own * (A x))``, all adapters side by side, where `own` is 1 in the directions of
    the row's own adapter and 0 in all others. Rows need not be sorted by their adapters, and the
    cost grows with the ranks of all adapters together.
    """

    def __init__(self, base: Adapted, adapters: Sequence[str]) -> None:
        super().__init__()
        present = [(i, name) for i, name in enumerate(adapters) if name in base.settings]
        As, Bs = zip(*(base.factors(name) for _, name in present), strict=True)
        self.weight, self.bias = base.weight.detach(), _detached(base.bias)
        self.A_RI, self.B_OR = torch.cat(As), torch.cat(Bs, dim=1)
        owners = [torch.full((len(A),), i) for (i, _), A in zip(present, As, strict=True)]
        self.owners_R = torch.cat(owners).to(self.weight.device)
        """int64 index of the adapter that a direction belongs to."""

    def forward(self, x: Tensor, adapter: RowSelection | None = None) -> Tensor:
        """``[..., in] -> [..., out]``; `adapter` are int64 indices of all N rows."""
        adapter_N = selected(adapter)
        assert isinstance(adapter_N, Tensor), "an inference copy runs rows by indices"
        x_NI = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        inner_NR = F.linear(x_NI, self.A_RI)
        inner_NR = inner_NR.masked_fill_(self.owners_R != adapter_N[:, None], 0)
        y_NO = F.linear(x_NI, self.weight, self.bias).addmm_(inner_NR, self.B_OR.T)
        return y_NO.view(*x.shape[:-1], -1)


@torch.no_grad()
def inference_copy(decoder: Decoder, adapters: Sequence[str]) -> Decoder:
    """Copy a decoder's modules; its weights are shared, unless an adapter is merged into them.

    Args:
        decoder: what is copied.
        adapters: names of what rows of tokens can run with (`OFF` is one), in the order of their
            indices. A single one is merged.

    Raises:
        TrainingError: an adapter is not finite.
    """
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    copied = copy.deepcopy(decoder, shared)
    for path, module in list(adapted(copied)):
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, _projection(module, adapters))
    return copied


def weight_bytes(copied: Decoder) -> int:
    """Return the memory of an inference copy's weights, each counted once."""
    tensors = [
        value
        for module in copied.modules()
        for value in (*vars(module).values(), *module.parameters(recurse=False))
        if isinstance(value, Tensor)
    ]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _projection(module: Adapted, adapters: Sequence[str]) -> nn.Module:
    bias = _detached(module.bias)
    if len(adapters) == 1:
        return MergedProjection(module.merged(adapters[0]), bias)
    if module.settings.keys().isdisjoint(adapters):
        return MergedProjection(module.merged(OFF), bias)
    return MixedProjection(module, adapters)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
