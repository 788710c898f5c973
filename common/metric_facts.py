"""What is known of a metric beside its value: kind, unit, meaning, and what varies within it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Kind = Literal["gauge", "counter"]
"""gauge: of one step; counter: since the run began, restarts and resumes included."""
Stage = Literal["sft", "reward", "train", "held_out"]

LABELS: Mapping[str, str] = {
    "age": "how many versions older than the trained policy",
    "check": "name of a check, a section of docs/diagnosis.md",
    "severity": "`warning` or `critical`",
    "cause": "`died`, `hung`, `unstarted`, `preempted` or `corrupt`",
    "component": "name of a reward component",
    "k": "1, 2, 4 ... up to `evaluate.samples`",
    "part": "name that a reward function gives to a part of its score",
    "pool": "`rollout` or `reward`",
    "role": "`rollout`, `reward`, `learner` or `controller`",
    "worker": "name of a process, such as `rollout-0` or `learner-1`",
    "source": "name of a source of `data.mixture`; a slash in it is written as a colon",
    "reason": "`dead letter`: its scorer gave it up; `lone`: no other response of its prompt is "
    "left to compare it with; `no signal`: all responses of its prompt have one score "
    "(`train.dynamic_sampling`); `stale`: too old when its turn came; `lost`: its table went down "
    "with a node; `late`: others of its table were committed first",
}
"""What varies within a metric, and its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a metric beside its name."""

    name: str
    stages: tuple[Stage, ...]
    kind: Kind
    unit: str
    meaning: str
    look_for: str
    when: str
    """When it is logged; empty for always."""
    own_series: str = ""
    """Where the name without its labels is another metric's too."""

    @property
    def series(self) -> str:
        """Its name as one of Ray's metrics, after ``talipot_``; what varies is a label there."""
        plain = self.own_series or re.sub(r"\W+", "_", re.sub(r"{\w+}", "", self.name)).strip("_")
        return f"{plain}_total" if self.kind == "counter" else plain


class Catalogue(StrEnum):
    """Metrics by their names, each with its facts; the base of each list of them."""

    facts: Facts

    def __new__(cls, facts: Facts) -> Catalogue:
        """Make a member whose text is its name."""
        member = str.__new__(cls, facts.name)
        member._value_ = facts.name
        member.facts = facts
        return member

    @property
    def labels(self) -> tuple[str, ...]:
        """What varies within it, in the order in which the name has it."""
        return tuple(re.findall(r"{(\w+)}", self))

    def of(self, *values: object) -> str:
        """Return the name that is written for these values of its labels."""
        return self.format(**dict(zip(self.labels, map(str, values), strict=True)))


def gauge(
    name: str,
    unit: str,
    meaning: str,
    *stages: Stage,
    look_for: str = "",
    when: str = "",
    series: str = "",
) -> Facts:
    """Return what is known of a value of one step; of policy training unless a stage is named."""
    return Facts(
        name=name,
        stages=stages or ("train",),
        kind="gauge",
        unit=unit,
        meaning=meaning,
        look_for=look_for,
        when=when,
        own_series=series,
    )


def counter(
    name: str, unit: str, meaning: str, *, look_for: str = "", when: str = "", series: str = ""
) -> Facts:
    """Return what is known of a count since policy training began."""
    return Facts(
        name=name,
        stages=("train",),
        kind="counter",
        unit=unit,
        meaning=meaning,
        look_for=look_for,
        when=when,
        own_series=series,
    )
