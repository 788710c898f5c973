"""KL(pi_old || pi) of an auxiliary phase, read from states: a stretch of the vocabulary at a time.

Logits of both policies are made where they are needed, forwards and backwards, and never stand in
memory as a whole. Nor does the output head of pi_old under ZeRO 3: a stretch of it is gathered, and
as stretches are of the vocabulary, and not of positions, all ranks gather equally often.

Shape suffixes: N positions, D width, V vocabulary, v a stretch of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.devices import PROCESSOR
from common.models.embedding import HeadReader, HeadRows, Rule, logits_of
from common.models.precision import wide
from learner.algorithms.ppg import Normalizer, clone_kl

_ALIGNED = 64
"""Tokens that a stretch is a multiple of: rows then begin where memory is aligned, for which
products of the same numbers are the same."""
_WIDEST = 2048
"""Tokens of a stretch at most, on a processor. Of 64 MiB of logits, so many at a time take 0.7 of
the time that 16,384 take: they are still in its cache when the next operation reads them."""


@dataclass(frozen=True, slots=True)
class ClonedFrom(HeadReader):
    """Reads KL(pi_old || pi) at each position, ``[N, 1]``."""

    old_ND: Tensor
    """States of pi_old."""
    old_head: Callable[[], HeadRows] | None
    """pi_old's output head, all of the vocabulary in its order; None: it is that of pi."""

    def read(
        self, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rule: Rule, rows: int
    ) -> Tensor:
        """Return the KL; as `HeadReader.read`."""
        fit = rows * len(weight_VD) // max(1, len(states_ND)) // _ALIGNED * _ALIGNED
        most = _WIDEST if states_ND.device.type == PROCESSOR else len(weight_VD)
        width = max(min(fit, most), _ALIGNED)
        rounded = replace(self, old_ND=self.old_ND.to(states_ND.dtype))
        kl_N: Tensor = _Streamed.apply(  # type: ignore[no-untyped-call]
            states_ND, weight_VD, bias_V, rounded, rule, width
        )
        return kl_N[:, None]

    def at(self, places: Tensor) -> ClonedFrom:
        """Return the same for some of the positions."""
        return replace(self, old_ND=self.old_ND[places])

    def stretches(
        self, weight_VD: Tensor, bias_V: Tensor | None, width: int
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield tokens of the vocabulary, and pi_old's head for them (a collective)."""
        begin, vocabulary = 0, len(weight_VD)
        head = iter([(weight_VD, bias_V)]) if self.old_head is None else self.old_head()
        for rows_vD, numbers_v in head:
            end = min(begin + len(rows_vD), vocabulary)
            for first in range(begin, end, width):
                part = slice(first, min(first + width, end))
                own = slice(part.start - begin, part.stop - begin)
                yield part, rows_vD[own], None if numbers_v is None else numbers_v[own]
            begin += len(rows_vD)


class _Streamed(torch.autograd.Function):
    """Written out: logits are made anew in the backward pass, and no module is called there."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        reader: ClonedFrom,
        rule: Rule,
        width: int,
    ) -> Tensor:
        def logits() -> Iterator[tuple[Tensor, Tensor]]:
            for part, old_vD, old_v in reader.stretches(weight_VD, bias_V, width):
                yield (
                    rule(logits_of(reader.old_ND, old_vD, old_v)),
                    rule(logits_of(states_ND, *_rows(weight_VD, bias_V, part))),
                )

        found = clone_kl(logits())
        ctx.save_for_backward(states_ND, weight_VD, bias_V, *found.old, *found.new)
        ctx.reader, ctx.rule, ctx.width = reader, rule, width
        return found.kl

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD, bias_V, old_peak, old_total, peak, total = ctx.saved_tensors
        old, new, reader = Normalizer(old_peak, old_total), Normalizer(peak, total), ctx.reader
        states_gradient_ND = torch.zeros_like(wide(states_ND))
        total_VD = torch.empty_like(wide(weight_VD)) if ctx.needs_input_grad[1] else None
        total_V = torch.empty_like(wide(bias_V)) if ctx.needs_input_grad[2] else None
        for part, old_vD, old_v in reader.stretches(weight_VD, bias_V, ctx.width):
            rows_vD, numbers_v = _rows(weight_VD, bias_V, part)
            raw_Nv = logits_of(states_ND, rows_vD, numbers_v).requires_grad_()
            with torch.enable_grad():
                logits_Nv = ctx.rule(raw_Nv)
            old_Nv = ctx.rule(logits_of(reader.old_ND, old_vD, old_v))
            inner_Nv = new.probabilities(logits_Nv.detach()) - old.probabilities(old_Nv)
            inner_Nv *= gradient_N[:, None]
            (inner_Nv,) = torch.autograd.grad(logits_Nv, raw_Nv, inner_Nv)
            if total_V is not None:
                total_V[part] = inner_Nv.sum(0)
            inner_Nv = inner_Nv.to(states_ND.dtype)
            states_gradient_ND += inner_Nv @ rows_vD.to(inner_Nv.dtype)
            if total_VD is not None:
                total_VD[part] = inner_Nv.T @ states_ND
        return (
            states_gradient_ND.to(states_ND.dtype),
            None if total_VD is None else total_VD.to(weight_VD.dtype),
            None if total_V is None else total_V.to(bias_V.dtype),
            None,
            None,
            None,
        )


def _rows(weight_VD: Tensor, bias_V: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None]:
    return weight_VD[part], None if bias_V is None else bias_V[part]
