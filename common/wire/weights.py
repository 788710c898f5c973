"""Weights on the wire: one flat buffer, cut into hashed slices, never a call per tensor.

A publisher hands out its share of the parameters as they lie, in order of their names; a manifest
lists the slices and their hashes; a receiver copies them into its own flat buffer, hashes what it
stores there as it stores it and compares (invariant I6). The hash is xxh3-128: a cryptographic one
would cost more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any, SupportsIndex

import numpy as np
import torch
import xxhash
from torch import Tensor

from common.devices import PROCESSOR
from common.errors import TrainingError
from common.pages import Pages
from common.wire.hashing import Bytes, hasher


class Payload(tuple[Bytes, ...]):
    """A slice's bytes in consecutive parts, so that no copy is needed to lay them together."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle the buffers alone, for the object store.

        To pickle arrays takes a third of the time that copying a small payload takes.
        """
        if int(protocol) < 5:
            return tuple(super().__reduce_ex__(protocol))
        return _received, tuple(PickleBuffer(part.data) for part in self)


def _received(*parts: memoryview) -> Payload:
    return Payload(np.frombuffer(part, dtype=np.uint8) for part in parts)


class CorruptSliceError(TrainingError):
    """A slice of weights is not what its rank published."""


_BEYOND_CACHES = 64 * 2**20


"""Bytes of a buffer that is written around the processor's caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A contiguous run of the flat buffer. Made by a learner rank, read by rollout actors."""

    rank: int
    """The rank that published it."""
    offset: int
    """First byte in the flat buffer."""
    length: int
    """Bytes."""
    digest: str
    """xxh3-128 of the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All slices of one policy version. Made by the controller, read by rollout actors."""

    policy_version: int
    total: int
    """Bytes of the whole buffer."""
    layout: str
    """Hash of names, shapes and dtype: buffers of another architecture never fit."""
    slices: tuple[Slice, ...]
    """In order of offset, covering the buffer without a gap."""

    @property
    def fingerprint(self) -> str:
        """Hash of layout and content; stamped on every rollout."""
        digests = "|".join(f"{s.offset}:{s.length}:{s.digest}" for s in self.slices)
        return _text_hash(f"{self.layout}|{self.total}|{digests}")


class FlatBuffer:
    """Parameters as views of one contiguous buffer, in order of their names."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        base: str = "",
        device: str = PROCESSOR,
    ) -> None:
        """Lay parameters out in one buffer.

        Args:
            parameters: with their names.
            dtype: of the buffer, and of the parameters from now on.
            base: fingerprint of the base of adapters.
            device: where the parameters are.
        """
        named = sorted(parameters, key=lambda pair: pair[0])
        self.total = sum(p.numel() for _, p in named) * dtype.itemsize
        self.layout = layout_hash({name: tuple(p.shape) for name, p in named}, dtype, base)
        numbers = self.total // dtype.itemsize
        self._pages = Pages((numbers,), dtype) if device == PROCESSOR else None
        if self._pages is None:
            self._flat = torch.empty(numbers, dtype=dtype, device=device)
        else:
            self._flat = self._pages.tensor
        offset = 0
        for _, parameter in named:
            view = self._flat[offset : offset + parameter.numel()].view(parameter.shape)
            with torch.no_grad():
                view.copy_(parameter)
            parameter.data = view
            offset += parameter.numel()

    @property
    def bytes(self) -> Bytes:
        """The buffer itself as bytes; writing here writes the parameters."""
        return self._flat.view(torch.uint8).numpy()

    def give_back(self, parameter: Tensor) -> None:
        """Give the memory of a parameter, or of a part of one, back until the next `load`."""
        if self._pages is not None and parameter in self._pages:
            self._pages.give_back(parameter)

    def load(self, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        """Copy slices in, hash what is stored, and return its fingerprint.

        Raises:
            TrainingError: a slice is missing or of another layout.
            CorruptSliceError: a slice is not what its hash says.
        """
        if manifest.layout != self.layout or manifest.total != self.total:
            raise TrainingError(
                f"weights version {manifest.policy_version} are of another architecture "
                f"or for another base (layout {manifest.layout[:8]}, ours {self.layout[:8]})"
            )
        if self._pages is not None:
            self._pages.prepare()
        staging, reached = self._staging(manifest), 0
        for piece, payload in zip(manifest.slices, payloads, strict=True):
            if piece.offset != reached or sum(part.nbytes for part in payload) != piece.length:
                raise TrainingError(
                    f"weights version {manifest.policy_version}: slice of rank {piece.rank} "
                    f"does not fit at byte {reached}"
                )
            held, ours = hasher(), self._flat.view(torch.uint8)[reached : reached + piece.length]
            if staging is None:
                held.copy(payload, ours.numpy(), around_caches=self.total > _BEYOND_CACHES)
            else:
                held.update([_by_way_of(staging, payload, ours)])
            reached += piece.length
            if held.hexdigest() != piece.digest:
                raise CorruptSliceError(
                    f"weights version {manifest.policy_version}: slice of rank {piece.rank} "
                    "arrived corrupted"
                )
        if reached != self.total:
            raise TrainingError(f"weights version {manifest.policy_version} are incomplete")
        return manifest.fingerprint

    def _staging(self, manifest: Manifest) -> Tensor | None:
        """Return memory that the device copies slices from; None where they are stored at once.

        The system must not move it meanwhile (pinned), or the copy is made twice.
        """
        if self._pages is not None:
            return None
        largest = max((piece.length for piece in manifest.slices), default=0)
        return torch.empty(largest, dtype=torch.uint8, pin_memory=self._flat.is_cuda)


def _by_way_of(staging: Tensor, payload: Payload, to: Tensor) -> Bytes:
    """Copy a slice to a device, in one piece, and return the bytes that the device has then."""
    staged, begin = staging[: len(to)].numpy(), 0
    for part in payload:
        staged[begin : begin + part.nbytes] = part
        begin += part.nbytes
    to.copy_(staging[: len(to)])
    found: Bytes = to.cpu().numpy()
    return found


def slice_bounds(total_elements: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return first and last + 1 element of a rank's share; shares differ by one element at most."""
    share, rest = divmod(total_elements, ranks)
    first = rank * share + min(rank, rest)
    return first, first + share + (rank < rest)


def digest(payload: Payload) -> str:
    """Return the xxh3-128 of all parts, as if they were one."""
    hashed = hasher()
    hashed.update(payload)
    return hashed.hexdigest()


def layout_hash(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, base: str = "") -> str:
    """Return a hash of names, shapes and dtype, and of what adapters belong to."""
    text = ";".join(f"{name}{tuple(shapes[name])}" for name in sorted(shapes))
    return _text_hash(f"{dtype}|{text}|{base}" if base else f"{dtype}|{text}")


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the content hash of a state dict, independent of how it was sharded."""
    return tensors_hash((name, state[name]) for name in sorted(state))


def tensors_hash(ordered: Iterable[tuple[str, Tensor]]) -> str:
    """Return the same of tensors in order of their names, of which one at a time is looked at."""
    hashed = hasher()
    for name, given in ordered:
        tensor = given.detach().cpu().contiguous()
        described = f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
        hashed.update([described, tensor.reshape(-1).view(torch.uint8).numpy()])
    return hashed.hexdigest()


def manifest_of(
    state: Mapping[str, Tensor],
    policy_version: int,
    dtype: torch.dtype = torch.float32,
    base: str = "",
) -> tuple[Manifest, Payload]:
    """Return a manifest of one slice from a state dict of parameters, and its bytes."""
    named = sorted(state.items())
    payload = torch.cat([t.detach().to(dtype).reshape(-1) for _, t in named])
    data = payload.view(torch.uint8).numpy()
    layout = layout_hash({name: tuple(t.shape) for name, t in named}, dtype, base)
    piece = Slice(rank=0, offset=0, length=data.nbytes, digest=digest(Payload([data])))
    manifest = Manifest(
        policy_version=policy_version, total=data.nbytes, layout=layout, slices=(piece,)
    )
    return manifest, Payload([data])


def _text_hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
