"""Publishing: each rank hashes its slice of the policy and hands out its bytes without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from common.devices import PROCESSOR, wait_for
from common.wire.hashing import Bytes
from common.wire.weights import Payload, Slice, digest, layout_hash, slice_bounds
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One rank's contribution to a manifest."""

    slice: Slice
    total: int
    """Bytes of the whole buffer."""
    layout: str
    """Hash of names, shapes and dtype."""


Named = Iterable[tuple[str, torch.Tensor]]
"""Parameters by name."""

Gathered = Callable[[list[torch.Tensor]], AbstractContextManager[None]]
"""Makes parameters whole inside a block, as `ZeroEngine.gathered`."""


@dataclass(slots=True)
class _Range:
    """What a rank publishes of one parameter: elements begin .. end - 1."""

    parameter: torch.Tensor
    begin: int
    end: int
    address: int = 0
    """Of the parameter whose elements `bytes` are."""
    bytes: Bytes | None = None
    """Those elements in the parameter's own memory, where they can be sent from there."""

    @property
    def elements(self) -> torch.Tensor:
        """The elements, flat."""
        return self.parameter.detach().reshape(-1)[self.begin : self.end]


class Publisher:
    """A rank's slice of all parameters in order of their names, version after version.

    The bytes are the parameters' own where those are on the processor and in `dtype`, and of
    parameters on a device in memory that the next version is copied to as well: they are to be
    sent before the next optimizer step. What is hashed is what was read back of the device.
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
        """Cut the parameters into slices, one for each rank.

        Args:
            named: parameters by name, the same on every rank.
            rank: this process's number.
            ranks: ranks in all.
            dtype: what is sent.
            base: fingerprint of the weights that adapters belong to.
            gathered: makes parameters whole that ranks keep in parts (a collective); None where
                every rank has them whole.
        """
        ordered = sorted(named, key=lambda pair: pair[0])
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in ordered}
        total = sum(map(math.prod, shapes.values()))
        self._rank, self._dtype, self._gathered = rank, dtype, gathered
        self._total, self._layout = total * dtype.itemsize, layout_hash(shapes, dtype, base)
        first, last = slice_bounds(total, ranks, rank)
        self._offset = first * dtype.itemsize
        self._ranges, offset = [], 0
        for name, parameter in ordered:
            size = math.prod(shapes[name])
            begin, end = max(first - offset, 0), min(last - offset, size)
            self._ranges.append(_Range(parameter, begin, end))
            offset += size
        self._read_from = next((p.device for _, p in ordered if p.device.type != PROCESSOR), None)
        self._read = torch.empty(0, dtype=dtype)
        """What a device's parameters are copied to: the slice."""
        if self._read_from is not None:
            pinned = self._read_from.type == "cuda"
            self._read = torch.empty(last - first, dtype=dtype, pin_memory=pinned)

    def publish(self) -> tuple[Publication, Payload]:
        """Return facts and bytes of this rank's slice.

        They are apart because bytes go through the object store to the actors, never through the
        controller. Parameters are gathered one by one, never all at once.
        """
        if self._read_from is not None:
            payload = Payload([self._read_back(self._read_from)])
        elif self._gathered is None:
            payload = Payload(self._in_place(r) for r in self._ranges if r.begin < r.end)
        else:
            payload = Payload(self._copied(self._gathered))
        own = Slice(
            rank=self._rank,
            offset=self._offset,
            length=sum(part.nbytes for part in payload),
            digest=digest(payload),
        )
        return Publication(slice=own, total=self._total, layout=self._layout), payload

    def _in_place(self, part: _Range) -> Bytes:
        """Return the bytes of a range, in the parameter's own memory where that is possible.

        They are looked up again only when the parameter has moved: among hundreds of tensors that
        took a fifth of the time that hashing them takes.
        """
        address = part.parameter.data_ptr()
        if part.bytes is not None and part.address == address:
            return part.bytes
        elements = part.elements.to("cpu", self._dtype)
        data = elements.view(torch.uint8).numpy()
        if elements.data_ptr() == address + part.begin * self._dtype.itemsize:
            part.address, part.bytes = address, data
        return data

    def _read_back(self, device: torch.device) -> Bytes:
        """Return the bytes of all ranges as a device has them; it is waited for once."""
        begin = 0
        for part in self._ranges:
            with (self._gathered or _whole)([part.parameter]):
                size = max(0, part.end - part.begin)
                if size:
                    elements = part.elements.to(self._dtype)
                    self._read[begin : begin + size].copy_(elements, non_blocking=True)
                begin += size
        wait_for(device)
        return self._read.view(torch.uint8).numpy()

    def _copied(self, gathered: Gathered) -> Iterator[Bytes]:
        """Yield copies of all ranges: a gathered parameter is gone when its block ends."""
        for part in self._ranges:
            with gathered([part.parameter]):
                if part.begin < part.end:
                    elements = part.elements.to("cpu", self._dtype, copy=True)
                    yield elements.view(torch.uint8).numpy()


def _whole(_: list[torch.Tensor]) -> AbstractContextManager[None]:
    """Nothing to gather."""
    return nullcontext()


def publisher(engine: ZeroEngine, named: Named, *, dtype: torch.dtype, base: str = "") -> Publisher:
    """Publish this rank's slice of an engine's parameters, of all or of an adapter on `base`."""
    return Publisher(
        named,
        rank=rank(),
        ranks=world_size(),
        dtype=dtype,
        base=base,
        gathered=engine.gathered if engine.zero_stage == 3 else None,
    )
