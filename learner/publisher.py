"""Publishing: each rank hashes its share of the policy and hands it out as it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from common.hashing import Bytes
from common.weights import Payload, Slice, digest, layout_hash, slice_bounds
from learner.engine import ZeroEngine, rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One rank's contribution to a manifest."""

    piece: Slice
    total: int
    """Bytes of the whole buffer."""
    layout: str
    """Hash of names, shapes and dtype."""


Named = Sequence[tuple[str, torch.Tensor]]
Gathered = Callable[[list[torch.Tensor]], AbstractContextManager[None]]


def publish(
    engine: ZeroEngine, named: Named, *, dtype: torch.dtype, base: str = ""
) -> tuple[Publication, Payload]:
    """This rank's slice of an engine's parameters, of all or only of an adapter on `base`.

    Returns facts and bytes apart: the bytes go through the object store to the actors and never
    through the controller.

    Under ZeRO 3 parameters are gathered one by one (a collective), never all at once.
    """
    return slice_of(
        named,
        rank=rank(),
        ranks=world_size(),
        dtype=dtype,
        base=base,
        gathered=engine.gathered if engine.zero_stage == 3 else None,
    )


def slice_of(
    named: Named,
    *,
    rank: int,
    ranks: int,
    dtype: torch.dtype,
    base: str = "",
    gathered: Gathered | None = None,
) -> tuple[Publication, Payload]:
    """A rank's share of all parameters in order of their names, hashed.

    The bytes are the parameters' own where those are on the processor and in `dtype`: they are to
    be sent before the next optimizer step.
    """
    named = sorted(named, key=lambda pair: pair[0])
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    first, last = slice_bounds(total, ranks, rank)
    parts: list[Bytes] = []
    offset = 0
    for name, parameter in named:
        begin, end = max(first, offset) - offset, min(last, offset + sizes[name]) - offset
        with gathered([parameter]) if gathered else nullcontext():
            if begin < end:
                mine = parameter.detach().reshape(-1)[begin:end]
                # What was gathered goes when the block ends.
                mine = mine.to("cpu", dtype, copy=gathered is not None)
                parts.append(mine.contiguous().view(torch.uint8).numpy())
        offset += sizes[name]
    made = Publication(
        piece=Slice(
            rank=rank,
            offset=first * dtype.itemsize,
            length=sum(part.nbytes for part in parts),
            digest=digest(parts),
        ),
        total=total * dtype.itemsize,
        layout=layout_hash(shapes, dtype, base),
    )
    return made, parts
