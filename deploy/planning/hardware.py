"""What a recipe is planned for: the limits of cards, of links, and of this machine's processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one worker computes on: its limits, as a data sheet or a measurement has them."""

    name: str
    memory: float
    """Bytes; of a machine whose workers share it, all of it."""
    products: float
    """bf16 operations a second."""
    reads: float
    """Bytes of its memory a second."""
    link: float
    """Bytes a second to another of the same node, one way."""
    network: float
    """Bytes a second to one of another node."""
    per_node: int
    """How many a node has."""
    shared: bool = False
    """All workers share its memory and its products: a processor."""


def _card(name: str, gib: float, teraflops: float, tb_s: float, link_gb_s: float) -> Device:
    return Device(
        name=name,
        memory=gib * 2**30,
        products=teraflops * 1e12,
        reads=tb_s * 1e12,
        link=link_gb_s * 1e9,
        network=50e9,  # 400 Gbit/s
        per_node=8,
    )


CARDS: Final = {
    "a100": _card("A100 80 GB", 80, 312, 2.04, 300),
    "h100": _card("H100 80 GB", 80, 989, 3.35, 450),
    "h200": _card("H200 141 GB", 140, 989, 4.8, 450),
    "b200": _card("B200 180 GB", 179, 2250, 8.0, 900),
    "l40s": _card("L40S 48 GB", 45, 362, 0.86, 32),
}
"""By the name that a command gives; dense bf16, as NVIDIA's data sheets have them."""


def this_processor() -> Device:
    """Measure this machine, in about a second."""
    copied = _copy_rate()
    return Device(
        name=f"this machine's processor, {torch.get_num_threads()} threads",
        memory=float(psutil.virtual_memory().total),
        products=_product_rate(),
        reads=copied,
        link=copied / 2,
        network=copied / 2,
        per_node=1,
        shared=True,
    )


def _product_rate() -> float:
    size = 1024
    square = torch.randn(size, size).to(torch.bfloat16)
    return 2 * size**3 / _fastest(lambda: torch.mm(square, square))


def _copy_rate() -> float:
    source = torch.zeros(2**25)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _fastest(lambda: target.copy_(source))


def _fastest(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best
