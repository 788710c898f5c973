"""Metrics as typed values that know how to merge: a mean carries its count."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from common.errors import TrainingError
from common.metric_catalogue import Logged


@dataclass(frozen=True, slots=True)
class Metric:
    """A number and how two of them become one."""

    value: float
    """The sum for a mean, else the number itself."""
    weight: float = 1.0
    """What the sum is over (tokens, rows); 1 where it has no meaning."""
    how: Literal["mean", "sum", "max"] = "mean"

    def merge(self, other: Metric) -> Metric:
        """Combine with a measurement of the same thing elsewhere or later."""
        if self.how != other.how:
            raise ValueError(f"a {self.how} cannot merge with a {other.how}")
        if self.how == "max":
            return Metric(max(self.value, other.value), 1.0, "max")
        return Metric(self.value + other.value, self.weight + other.weight, self.how)

    def read(self) -> float:
        """Return the number to show."""
        if self.how != "mean":
            return self.value
        return self.value / self.weight if self.weight else math.nan


Metrics = dict[str, Metric]


def mean(total: float, count: float) -> Metric:
    """Make a mean from its sum and count."""
    return Metric(float(total), float(count), "mean")


def merge(many: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Merge by name."""
    merged: Metrics = {}
    for metrics in many:
        for name, metric in metrics.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def read(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return names and plain numbers."""
    return {name: metric.read() for name, metric in metrics.items()}


def component_means(said: Iterable[Mapping[str, float]]) -> Metrics:
    """Return the mean of each component of the score, and of each part that it names.

    Args:
        said: `score_components` of each response. A component that some of them lack is averaged
            over the others.
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    for of_response in said:
        for name, value in of_response.items():
            component, *part = name.split("/")
            metric = Logged.COMPONENT_PART if part else Logged.COMPONENT
            values[metric.of(component, *part)].append(value)
    return {name: mean(sum(found), len(found)) for name, found in values.items()}


def require_finite(name: str, value: float, where: str) -> float:
    """Pass a finite number through.

    Raises:
        TrainingError: naming the quantity and the place.
    """
    if not math.isfinite(value):
        raise TrainingError(
            f"{name} became {value} at {where}; the run stopped before the weights were touched. "
            "Lower the learning rate, or resume from the last checkpoint"
        )
    return value
