from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from common.wire.weights import FlatBuffer, Manifest, Payload
from learner.zero.publisher import Gathered, Publisher


def parameters(seed: int) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": (3, 5), "a": (7,), "c": (1,), "d": (2, 2, 300)}
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in made.items()})


def arrived(publishers: list[Publisher], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a receiver holds after loading all ranks' slices."""
    parts = [publisher.publish() for publisher in publishers]
    held = parameters(seed=1).to(dtype)
    buffer = FlatBuffer(held.named_parameters(), dtype)
    facts = parts[0][0]
    slices = tuple(made.slice for made, _ in parts)
    manifest = Manifest(policy_version=0, total=facts.total, layout=facts.layout, slices=slices)
    assert buffer.load(manifest, [payload for _, payload in parts]) == manifest.fingerprint
    return {name: tensor.detach() for name, tensor in held.items()}


def publishers(
    sent: nn.ParameterDict, ranks: int, dtype: torch.dtype, gathered: Gathered | None = None
) -> list[Publisher]:
    return [
        Publisher(sent.named_parameters(), rank=rank, ranks=ranks, dtype=dtype, gathered=gathered)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_is_what_the_parameters_are_at_each_publish(
    ranks: int, dtype: torch.dtype
) -> None:
    """Updated in place, as by an optimizer, and moved elsewhere, as by DeepSpeed; some of 2000
    ranks have no share of 1223 elements."""
    sent = parameters(seed=0)
    made = publishers(sent, ranks, dtype)
    for change in ("none", "in place", "moved", "in place"):
        with torch.no_grad():
            for parameter in sent.values():
                if change == "in place":
                    parameter.mul_(-1.5)
                elif change == "moved":
                    parameter.data = parameter.data.clone() + 1.0
        found = arrived(made, dtype)
        assert all(torch.equal(found[name], sent[name].to(dtype)) for name in sent), change


def test_what_is_gathered_is_copied_before_it_goes() -> None:
    sent, whole = parameters(seed=0), parameters(seed=0)

    @contextmanager
    def gathered(wanted: list[torch.Tensor]) -> Iterator[None]:
        (parameter,) = wanted
        name = next(n for n, p in sent.items() if p is parameter)
        parameter.data.copy_(whole[name].data)
        yield
        parameter.data.zero_()

    found = arrived(publishers(sent, 2, torch.float32, gathered), torch.float32)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_bytes_that_lie_where_they_are_sent_from_are_not_copied() -> None:
    sent = parameters(seed=0)
    _, payload = publishers(sent, 1, torch.float32)[0].publish()
    addresses = {parameter.data_ptr() for parameter in sent.values()}
    assert {part.ctypes.data for part in payload} == addresses


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_payload_travels_by_any_protocol(protocol: int) -> None:
    _, payload = publishers(parameters(seed=0), 1, torch.float32)[0].publish()
    buffers: list[pickle.PickleBuffer] = []
    aside = buffers.append if protocol == 5 else None
    text = pickle.dumps(payload, protocol=protocol, buffer_callback=aside)
    back = pickle.loads(text, buffers=buffers)
    assert isinstance(back, Payload)
    assert [part.tobytes() for part in back] == [part.tobytes() for part in payload]
    assert len(buffers) == (len(payload) if protocol == 5 else 0)
    assert isinstance(copy.deepcopy(payload), Payload)
