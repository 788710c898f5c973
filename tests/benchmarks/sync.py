"""Publishing weights to actors against plain copies of the same bytes."""

from __future__ import annotations

from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from common.wire.weights import FlatBuffer, Manifest
from learner.zero.publisher import Publisher
from tests.benchmarks.measure import Result, interleaved

BYTES, ACTORS, REPEATS = 256 * 2**20, 4, 31
WARM_UP = 6
"""Rounds before the clock counts. The first puts of a store took 110 to 270 ms where later ones
took 20, probably for pages that were never written before; a run is past that soon."""


def module(tensors: int) -> nn.ParameterList:
    size = BYTES // 4 // tensors
    return nn.ParameterList([nn.Parameter(torch.ones(size)) for _ in range(tensors)])


def shared(memory: SharedMemory) -> np.ndarray:
    assert memory.buf is not None
    return np.frombuffer(memory.buf, dtype=np.uint8)[:BYTES]


class Sender:
    """A learner rank without its learner."""

    def __init__(self, tensors: int) -> None:
        self.publisher = Publisher(
            module(tensors).named_parameters(), rank=0, ranks=1, dtype=torch.float32
        )
        self.plain = np.ones(BYTES, dtype=np.uint8)
        self.memory: SharedMemory | None = None  # mapped once, as the object store is

    def publish(self) -> Any:
        return self.publisher.publish()

    def copy_in(self, name: str) -> None:
        self.memory = self.memory or SharedMemory(name)
        shared(self.memory)[:] = self.plain


class Receiver:
    """A rollout actor without its engine."""

    def __init__(self, tensors: int) -> None:
        self.buffer = FlatBuffer(module(tensors).named_parameters(), torch.float32)
        self.plain = np.ones(BYTES, dtype=np.uint8)
        self.memory: SharedMemory | None = None  # mapped once, as the object store is

    def load(self, manifest: Manifest, payload: Any) -> str:
        return self.buffer.load(manifest, [payload])

    def copy_out(self, name: str) -> None:
        self.memory = self.memory or SharedMemory(name)
        self.plain[:] = shared(self.memory)


def publish(sender: Any, receivers: list[Any]) -> None:
    facts, payload = sender.publish.options(num_returns=2).remote()
    made = ray.get(facts)
    manifest = Manifest(
        policy_version=0, total=made.total, layout=made.layout, slices=(made.slice,)
    )
    held = ray.get([receiver.load.remote(manifest, payload) for receiver in receivers])
    assert set(held) == {manifest.fingerprint}


def copies(sender: Any, receivers: list[Any], name: str) -> None:
    ray.get(sender.copy_in.remote(name))
    ray.get([receiver.copy_out.remote(name) for receiver in receivers])


def run() -> list[Result]:
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=2 * 2**30, log_to_driver=False
    )
    memory = SharedMemory(create=True, size=BYTES)
    sides = {}
    for tensors in (1, 400):
        sender = ray.remote(Sender).options(num_cpus=0).remote(tensors)
        receivers = [
            ray.remote(Receiver).options(num_cpus=0).remote(tensors) for _ in range(ACTORS)
        ]
        sides[tensors] = (sender, receivers)
    runs = {
        "copies": lambda: copies(*sides[1], memory.name),
        "1": lambda: publish(*sides[1]),
        "400": lambda: publish(*sides[400]),
    }
    interleaved(runs, WARM_UP)
    found = interleaved(runs, REPEATS)
    ray.shutdown()
    memory.close()
    memory.unlink()
    return [
        Result(
            key="sync_vs_copy",
            value=found["1"] / found["copies"],
            metric=f"publish and load {BYTES // 2**20} MiB to {ACTORS} actors, hashed",
            ours=f"{found['1'] * 1e3:,.0f} ms",
            baseline=f"{found['copies'] * 1e3:,.0f} ms, 1 plain copy in, {ACTORS} out",
        ),
        Result(
            key="sync_400_vs_1",
            value=found["400"] / found["1"],
            metric="the same bytes in 400 tensors",
            ours=f"{found['400'] * 1e3:,.0f} ms",
            baseline=f"{found['1'] * 1e3:,.0f} ms in one tensor",
        ),
    ]
