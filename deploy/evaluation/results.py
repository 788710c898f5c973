"""What an evaluation finds, as records, and the form that these have in a run's files.

In ``evaluation.json`` and ``summary.json`` every figure has one key: its name, then ``_low`` or
``_high`` for the ends of its interval, then the side that it is of, if it is of one::

    PolicyComparison(win_rate=Interval(...), policy=PolicyFigures(nll=2.3, ...), ...)
    {"win_rate": 0.87, "win_rate_low": 0.84, "win_rate_high": 0.89, "nll_policy": 2.3, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from deploy.evaluation.intervals import Interval

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFigures:
    """What was measured of one policy: means over the prompts that were judged."""

    judge_score: float
    """By the judge; by the run's own reward where there is none."""
    score: float
    """By the run's own reward, which the policy was trained on."""
    nll: float
    """Negative log-likelihood under the supervised policy, nats per token."""
    response_length: float
    """In tokens."""
    distinct: float
    """Share of the responses that differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyComparison:
    """The trained policy against the supervised one, on the same prompts."""

    win_rate: Interval
    """How often the trained policy's response is the better one, ties left out."""
    ties_share: float
    kl: float
    """Of the trained policy to the supervised one, nats per response."""
    sft: PolicyFigures
    policy: PolicyFigures
    pairs_judged: int
    """Prompts of which both responses have a score and the judge's opinion."""
    pairs_asked: int
    """All prompts."""


class HasFigures(Protocol):
    """What an evaluation of a task found."""

    def figures(self) -> Mapping[str, Any]:
        """Return all figures by their keys in ``summary.json``."""


Found = TypeVar("Found", bound=HasFigures)


@dataclass(frozen=True, kw_only=True)  # Python 3.11 has no slots in frozen generics
class RecipeOutcome(Generic[Found]):
    """A whole run of a recipe that teaches a chat model."""

    evaluation: Found
    trained: Mapping[str, Any]
    """The controller's facts on policy training."""
    resident_gb: float
    """The most memory that all processes held at once, in 10^9 bytes."""
    seconds: Mapping[str, float]
    """Wall time of each stage, and of all of them under ``pipeline``."""

    def figures(self) -> dict[str, Any]:
        """Return all figures by their keys in ``summary.json``."""
        return {
            **self.trained,
            **self.evaluation.figures(),
            "resident_gb": self.resident_gb,
            **{f"seconds_{name}": seconds for name, seconds in self.seconds.items()},
        }


def figures_of(record: DataclassInstance, side: str = "") -> dict[str, float]:
    """Return a record's figures by their keys in a run's files; a record in it is a side of it."""
    figures: dict[str, float] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value) and not isinstance(value, Interval | type):
            figures |= figures_of(value, field.name)
        elif value is not None:
            figures |= keyed(field.name, value, side)
    return figures


def keyed(name: str, value: Interval | float, side: str = "") -> dict[str, float]:
    """Return one figure by its keys; an interval has three."""
    if not isinstance(value, Interval):
        return {_key(name, side): value}
    ends = {"": value.mean, "_low": value.low, "_high": value.high}
    return {_key(name + end, side): bound for end, bound in ends.items()}


def figure(figures: Mapping[str, Any], name: str, side: str = "") -> Interval | float | None:
    """Read one figure back; None where the file, perhaps of an earlier version, has none."""
    value, low, high = (figures.get(_key(name + end, side)) for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return value
    return Interval(mean=value, low=low, high=high)


def _key(name: str, side: str) -> str:
    return f"{name}_{side}" if side else name
