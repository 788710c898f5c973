"""What health checks read, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

from common.config.run import RunConfig
from deploy.run_folder.log_lines import HELD_OUT, Line

LASTING = 5
"""Iterations in a row before a drift is told."""

Severity = Literal["warning", "critical"]
SEVERITIES: Final[tuple[Severity, ...]] = ("warning", "critical")

Said = tuple[Severity, str, str]
"""Severity, evidence and advice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is wrong with a run."""

    check: str
    """Which check says so: the anchor of its section in ``docs/diagnosis.md``."""
    severity: Severity
    iteration: int
    """The last one that it was seen in."""
    evidence: str
    """Figures and threshold, in words."""
    advice: str
    """What to look at, or to change, first."""

    @property
    def section(self) -> str:
        """Where the docs say more."""
        return f"docs/diagnosis.md#{self.check}"


@dataclass(frozen=True, slots=True)
class History:
    """What checks read."""

    config: RunConfig
    iterations: list[Line]
    """Of policy training, oldest first, those of the surviving history alone."""
    held_out: list[Line]
    """Evaluations while it trained, likewise."""
    now: float | None = None
    """Unix seconds, of a run that is at work; None: it has ended."""

    @classmethod
    def of(cls, config: RunConfig, lines: Sequence[Line], now: float | None = None) -> History:
        """Take the lines of a log: of what was trained again, the later one."""
        return cls(config, _surviving(lines, "train"), _surviving(lines, HELD_OUT), now)

    def last(self, metric: str, count: int) -> list[float]:
        """Return a metric in the last iterations; nothing where there are fewer that have it."""
        lines = (line for line in reversed(self.iterations) if metric in line.metrics)
        found = [line.metrics[metric] for line in islice(lines, count)]
        return found[::-1] if len(found) == count else []

    def first(self, metric: str, count: int = LASTING) -> list[float]:
        """Return a metric in the first iterations that have it."""
        lines = (line for line in self.iterations if metric in line.metrics)
        return [line.metrics[metric] for line in islice(lines, count)]


def followed(kept: list[Line], line: Line) -> None:
    """Add a stage's next line. What is trained again takes the place of what was, and of all after.

    A run that went back to a checkpoint goes on from there.
    """
    while kept and kept[-1].step >= line.step:
        kept.pop()
    kept.append(line)


def _surviving(lines: Sequence[Line], stage: str) -> list[Line]:
    kept: list[Line] = []
    for line in lines:
        if line.stage == stage:
            followed(kept, line)
    return kept
