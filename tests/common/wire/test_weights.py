"""Weights on the wire and on disk: what arrives is what was sent, or it is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.model import ModelConfig, PalmConfig
from common.errors import CheckpointError, TrainingError
from common.models.palm import PaLM
from common.models.weight_files import load_weights, save_weights
from common.wire.weights import (
    FlatBuffer,
    Manifest,
    Slice,
    digest,
    manifest_of,
    slice_bounds,
    state_hash,
)

SHAPE = PalmConfig(vocab_size=40, dim=16, layers=1, heads=2, head_dim=8, context=16)


def palm(seed: int, shape: ModelConfig = SHAPE) -> PaLM:
    network = PaLM(shape)
    network.initialise(seed)
    return network


def in_slices(network: PaLM, ranks: int) -> tuple[Manifest, list[list[np.ndarray]]]:
    """As a gang of ranks publishes: a slice each."""
    whole, (data,) = manifest_of(network.state_dict(), 7)
    pieces, payloads = [], []
    for rank in range(ranks):
        first, last = (4 * bound for bound in slice_bounds(whole.total // 4, ranks, rank))
        middle = (first + last) // 2
        payloads.append([data[first:middle].copy(), data[middle:last].copy()])
        pieces.append(
            Slice(rank=rank, offset=first, length=last - first, digest=digest(payloads[-1]))
        )
    return dataclasses.replace(whole, slices=tuple(pieces)), payloads


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slices_of_any_number_of_ranks_arrive(ranks: int) -> None:
    sender, receiver = palm(1), palm(2)
    buffer = FlatBuffer(receiver.named_parameters(), torch.float32)
    manifest, payloads = in_slices(sender, ranks)
    assert buffer.load(manifest, payloads) == manifest.fingerprint
    assert state_hash(receiver.state_dict()) == state_hash(sender.state_dict())
    tokens = torch.arange(10)[None]
    assert torch.equal(receiver(tokens), sender(tokens))


@given(st.integers(0, 2**31), st.integers(0, 7))
def test_one_flipped_bit_is_found(position: int, bit: int) -> None:
    manifest, payloads = in_slices(palm(1), 2)
    where = position % payloads[1][1].nbytes
    payloads[1][1][where] ^= np.uint8(1 << bit)
    with pytest.raises(TrainingError, match=r"version 7.*rank 1 arrived corrupted"):
        FlatBuffer(palm(2).named_parameters(), torch.float32).load(manifest, payloads)


def test_what_does_not_fit_is_refused() -> None:
    manifest, payloads = in_slices(palm(1), 2)
    wide = dataclasses.replace(manifest, layout="other")
    with pytest.raises(TrainingError, match="another architecture"):
        FlatBuffer(palm(2).named_parameters(), torch.float32).load(wide, payloads)
    with pytest.raises(TrainingError, match="does not fit"):
        FlatBuffer(palm(2).named_parameters(), torch.float32).load(
            manifest, [payloads[0], payloads[1][:1]]
        )
    short = dataclasses.replace(manifest, slices=manifest.slices[:1])
    with pytest.raises(TrainingError, match="incomplete"):
        FlatBuffer(palm(2).named_parameters(), torch.float32).load(short, payloads[:1])
    other = PalmConfig(**{**SHAPE.model_dump(), "layers": 2})
    with pytest.raises(TrainingError, match="another architecture"):
        FlatBuffer(palm(2, other).named_parameters(), torch.float32).load(manifest, payloads)


@given(st.integers(0, 1000), st.integers(1, 9))
def test_shares_cover_everything_once(total: int, ranks: int) -> None:
    bounds = [slice_bounds(total, ranks, rank) for rank in range(ranks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_the_hash_sees_names_shapes_types_and_values() -> None:
    state = {"a": torch.zeros(4), "b": torch.ones(2)}
    other = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, 1.0 + 2**-23])},
    ]
    assert len({state_hash(s) for s in [state, *other]}) == 5
    assert state_hash({"b": torch.ones(2), "a": torch.zeros(4)}) == state_hash(state)


def test_files_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(palm(1).state_dict(), path, {"model": "x"})
    network = palm(2)
    load_weights(network, path)
    assert state_hash(network.state_dict()) == state_hash(palm(1).state_dict())
    wide = PalmConfig(**{**SHAPE.model_dump(), "vocab_size": 41})
    with pytest.raises(CheckpointError, match=r"embedding.*\(40, 16\).*\(41, 16\)"):
        load_weights(palm(1, wide), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="torn"):
        load_weights(network, path)
    with pytest.raises(CheckpointError, match="no such weights"):
        load_weights(network, tmp_path / "none.safetensors")
