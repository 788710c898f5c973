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
    since: float = 0.0
    """Unix seconds at which what is at work began."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        lines: Sequence[Line],
        now: float | None = None,
        since: float = 0.0,
    ) -> History:
        """Take the lines of a log: of what was trained again, the later one."""
        history = cls(config, [], [], now, since)
        for line in lines:
            history.add(line)
        return history

    def add(self, line: Line) -> None:
        """Add the next line of the log.

        What is trained again takes the place of what was, and of all that came after it: a run that
        went back to a checkpoint goes on from there.
        """
        if line.stage == "train":
            _cut(self.iterations, line.step)
            _cut(self.held_out, line.step)
            self.iterations.append(line)
        elif line.stage == HELD_OUT:
            _cut(self.held_out, line.step)
            self.held_out.append(line)

    def last(self, metric: str, count: int) -> list[float]:
        """Return a metric in the last iterations; nothing where there are fewer that have it."""
        lines = (line for line in reversed(self.iterations) if metric in line.metrics)
        found = [line.metrics[metric] for line in islice(lines, count)]
        return found[::-1] if len(found) == count else []

    def first(self, metric: str, count: int = LASTING) -> list[float]:
        """Return a metric in the first iterations that have it."""
        lines = (line for line in self.iterations if metric in line.metrics)
        return [line.metrics[metric] for line in islice(lines, count)]


def _cut(lines: list[Line], step: int) -> None:
    """Take off what is of this step, or of a later one."""
    while lines and lines[-1].step >= step:
        lines.pop()
