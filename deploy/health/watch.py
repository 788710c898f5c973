"""A run's health while it works: its history in memory, and what has been told of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

from common.config.run import RunConfig
from common.live_metrics import Live
from deploy.gauges import Reading
from deploy.health.checks import CHECKS, verdicts, what_checks_read
from deploy.health.history import SEVERITIES, History, Verdict
from deploy.run_folder.log_lines import Line, read_lines


class Watch:
    """Looks at a run after each of its steps."""

    def __init__(self, config: RunConfig) -> None:
        """Begin with what the run's folder has of it already."""
        self._config, self._history = config, History.of(config, ())
        for line in read_lines(config.folder.metrics).lines:
            self._add(line)
        self.verdicts: tuple[Verdict, ...] = ()
        """Of the last look."""

    def look(self, stage: str, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        """Add a step of policy training, or an evaluation; return what was not wrong before it."""
        self._add(Line(stage=stage, step=step, metrics=metrics, time=time.time()))
        known = {(verdict.check, verdict.severity) for verdict in self.verdicts}
        self.verdicts = tuple(verdicts(self._history))
        return [v for v in self.verdicts if (v.check, v.severity) not in known]

    def _add(self, line: Line) -> None:
        self._history.add(replace(line, metrics=what_checks_read(line.metrics, self._config)))

    def readings(self) -> Iterator[Reading]:
        """Yield Ray's metric `talipot_health` of every check; from any thread."""
        found = {(verdict.check, verdict.severity) for verdict in self.verdicts}
        for check, severity in product(CHECKS, SEVERITIES):
            yield Reading.of(Live.HEALTH, (check, severity) in found, check, severity)
