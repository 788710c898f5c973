"""What every benchmark shares: the reference shape, the clock, a result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import ray
import torch

from common.config.model import PalmConfig
from deploy.workers.placement import NAMESPACE

SHAPE = PalmConfig(vocab_size=2048, dim=256, layers=6, heads=4, head_dim=64, context=192)
"""Reference shape S."""
PROMPT, RESPONSE = 64, 48
THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the table."""

    key: str
    """Name in ``benchmarks.json``."""
    value: float
    """What stands there: a ratio, a share or a rate."""
    metric: str
    ours: str
    baseline: str
    limit: str = ""
    """Share of the machine's limit, where that is known."""


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured by turns so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: median(found) for name, found in times.items()}


def product_rate(dtype: torch.dtype) -> float:
    """The machine's limit: floating-point operations a second of a large matrix product."""
    size = 2048
    left = torch.randn(size, size).to(dtype)
    right = torch.randn(size, size).to(dtype)
    torch.mm(left, right)
    took = min(seconds(lambda: torch.mm(left, right)) for _ in range(10))
    return 2 * size**3 / took


def share_of_limit(key: str, metric: str, rate: float, limit: float) -> Result:
    """Set a rate of bf16 operations against the machine's (`product_rate`)."""
    return Result(
        key=key,
        value=rate / limit,
        metric=metric,
        ours=f"{rate / 1e9:,.0f} GFLOP/s",
        baseline=f"{limit / 1e9:,.0f} bf16 product of 2048 x 2048",
        limit=f"{rate / limit:.0%}",
    )


def start_ray(object_store: int | None = None, *, cpus: int = THREADS) -> None:
    """A cluster of one, quiet; ended with ``ray.shutdown()``."""
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=object_store,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace=NAMESPACE,
    )
