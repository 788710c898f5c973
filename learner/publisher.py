"""Publishing: each rank lays its share of the policy in one flat buffer and hashes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from common.weights import Bytes, Slice, digest, layout_hash, slice_bounds
from learner.engine import ZeroEngine, rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One rank's contribution to a manifest."""

    piece: Slice
    total: int
    """Bytes of the whole buffer."""
    layout: str
    """Hash of names, shapes and dtype."""


def publish(
    engine: ZeroEngine, *, prefix: str, dtype: torch.dtype = torch.float32
) -> tuple[Publication, Bytes]:
    """Copy this rank's slice out of the parameters whose names start with `prefix`.

    Returns facts and bytes apart: the bytes go through the object store to the actors and never
    through the controller.

    Under ZeRO 3 parameters are gathered one by one (a collective), never all at once.
    """
    named = sorted(
        (name.removeprefix(prefix), parameter)
        for name, parameter in engine.network.named_parameters()
        if name.startswith(prefix)
    )
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    total = sum(sizes.values())
    first, last = slice_bounds(total, world_size(), rank())
    out = torch.empty(last - first, dtype=dtype)
    offset = 0
    for name, parameter in named:
        begin, end = max(first, offset), min(last, offset + sizes[name])
        with engine.gathered([parameter]):
            if begin < end:
                flat = parameter.detach().reshape(-1)
                out[begin - first : end - first] = flat[begin - offset : end - offset]
        offset += sizes[name]
    payload = out.view(torch.uint8).numpy()
    made = Publication(
        piece=Slice(
            rank=rank(),
            offset=first * dtype.itemsize,
            length=payload.nbytes,
            digest=digest(payload),
        ),
        total=total * dtype.itemsize,
        layout=layout_hash(shapes, dtype),
    )
    return made, payload
