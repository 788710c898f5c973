"""Publishing: each rank hashes its share of the policy and hands it out as it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from common.wire.hashing import Bytes
from common.wire.weights import Payload, Slice, digest, layout_hash, slice_bounds
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One rank's contribution to a manifest."""

    piece: Slice
    total: int
    """Bytes of the whole buffer."""
    layout: str
    """Hash of names, shapes and dtype."""


Named = Iterable[tuple[str, torch.Tensor]]
Gathered = Callable[[list[torch.Tensor]], AbstractContextManager[None]]


@dataclass(slots=True)
class _Share:
    """What a rank publishes of one parameter: elements begin .. end - 1."""

    parameter: torch.Tensor
    begin: int
    end: int
    address: int = 0
    """Of the parameter whose elements `bytes` are."""
    bytes: Bytes | None = None
    """Those elements where they lie, when they can be sent from there."""


class Publisher:
    """A rank's share of all parameters in order of their names, version after version.

    The bytes are the parameters' own where those are on the processor and in `dtype`: they are to
    be sent before the next optimizer step.
    """

    def __init__(
        self,
        named: Named,
        *,
        rank: int,
        ranks: int,
        dtype: torch.dtype,
        base: str = "",
        gathered: Gathered | None = None,
    ) -> None:
        """`base` is the fingerprint of what adapters belong to. `gathered` makes parameters whole
        that ranks hold in parts (a collective)."""
        ordered = sorted(named, key=lambda pair: pair[0])
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in ordered}
        total = sum(map(math.prod, shapes.values()))
        self._rank, self._dtype, self._gathered = rank, dtype, gathered
        self._total, self._layout = total * dtype.itemsize, layout_hash(shapes, dtype, base)
        first, last = slice_bounds(total, ranks, rank)
        self._offset = first * dtype.itemsize
        self._shares, offset = [], 0
        for name, parameter in ordered:
            size = math.prod(shapes[name])
            begin, end = max(first - offset, 0), min(last - offset, size)
            self._shares.append(_Share(parameter, begin, end))
            offset += size

    def publish(self) -> tuple[Publication, Payload]:
        """Facts and bytes apart: the bytes go through the object store to the actors and never
        through the controller.

        Parameters that are to be gathered are so one by one, never all at once.
        """
        if self._gathered is None:
            payload = Payload(self._lying(s) for s in self._shares if s.begin < s.end)
        else:
            payload = Payload(self._copied(self._gathered))
        piece = Slice(
            rank=self._rank,
            offset=self._offset,
            length=sum(part.nbytes for part in payload),
            digest=digest(payload),
        )
        return Publication(piece=piece, total=self._total, layout=self._layout), payload

    def _lying(self, share: _Share) -> Bytes:
        """A share's bytes. Where they lie is found anew only when the parameter has moved: among
        hundreds of tensors that took a fifth of the time that hashing them takes."""
        address = share.parameter.data_ptr()
        if share.bytes is not None and share.address == address:
            return share.bytes
        made = _elements(share).to("cpu", self._dtype)
        held = made.view(torch.uint8).numpy()
        if made.data_ptr() == address + share.begin * self._dtype.itemsize:
            share.address, share.bytes = address, held
        return held

    def _copied(self, gathered: Gathered) -> Iterator[Bytes]:
        """All shares' bytes; what was gathered goes when its block ends."""
        for share in self._shares:
            with gathered([share.parameter]):
                if share.begin < share.end:
                    made = _elements(share).to("cpu", self._dtype, copy=True)
                    yield made.view(torch.uint8).numpy()


def publisher(engine: ZeroEngine, named: Named, *, dtype: torch.dtype, base: str = "") -> Publisher:
    """Of this rank's share of an engine's parameters, of all or only of an adapter on `base`."""
    return Publisher(
        named,
        rank=rank(),
        ranks=world_size(),
        dtype=dtype,
        base=base,
        gathered=engine.gathered if engine.zero_stage == 3 else None,
    )


def _elements(share: _Share) -> torch.Tensor:
    return share.parameter.detach().reshape(-1)[share.begin : share.end]
