"""Reading back what runs append to line by line, torn ends included.

A run that is killed while it writes leaves half a line. Readers leave it out; the next writer cuts
it off, so that its own first line does not become the other half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.metric_catalogue import Logged

HELD_OUT = "held_out"
"""Stage of lines on evaluations while the policy is trained; their step is a policy version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One step of a stage in metrics.jsonl."""

    stage: str
    step: int
    metrics: Mapping[str, float]
    time: float = 0.0
    """When it was written, in seconds since 1970; 0 where the line does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What can be read of metrics.jsonl."""

    lines: list[Line]
    damaged: list[str]
    """Lines that are none, each with its place and what is wrong."""
    torn: bool
    """The last line has no end: it is being written, or its writer was killed."""


def read_lines(path: Path) -> Log:
    """Read all steps of all stages; nothing where there is no file. Raises for no content."""
    return Follower(path).log()


class Follower:
    """Reads a log again and again, and each time only what was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._read = 0
        """Bytes of whole lines that are taken in."""
        self._last = b""
        """The last of these, which tells this log from another in its place."""
        self._numbered = 0
        self._lines: list[Line] = []
        self._damaged: list[str] = []

    def log(self) -> Log:
        """Return what is there now; its lists are not to be changed, and grow with the next call.

        Of a log that was cut, or that another took the place of, everything is read anew.
        """
        rest = self._rest()
        if rest is None:
            self._begin()
            rest = self._rest() or b""
        *whole, torn = rest.split(b"\n")
        for text in whole:
            self._numbered += 1
            try:
                self._lines.append(_line(text))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self._damaged.append(
                    f"{self._path}:{self._numbered}: not a line of metrics ({error!r})"
                )
        if whole:
            self._read += len(rest) - len(torn)
            self._last = whole[-1] + b"\n"
        return Log(lines=self._lines, damaged=self._damaged, torn=bool(torn))

    def _rest(self) -> bytes | None:
        """Return what comes after what was read; None where that is not there any more."""
        if not self._path.exists():
            return b"" if not self._read else None
        with self._path.open("rb") as file:
            file.seek(self._read - len(self._last))
            if file.read(len(self._last)) != self._last:
                return None
            return file.read()


def read_metrics(path: Path) -> list[Line]:
    """Read all steps of all stages. A last line without its end is being written, and left out.

    Raises:
        DataError: no line at all, or a damaged one.
    """
    log = read_lines(path)
    if log.damaged:
        raise DataError(f"{log.damaged[0]}; remove the line")
    if not log.lines:
        raise DataError(f"{path}: no metrics yet; run a stage first")
    return log.lines


def held_out_scores(
    path: Path, responses: float | None = None, metric: str = Logged.SCORE
) -> dict[int, float]:
    """Return `metric` of each policy version that a run has logged an evaluation of.

    Only scores of as many responses can be compared: as many as are given, or as in the last line.
    """
    lines = [
        line for line in read_lines(path).lines if line.stage == HELD_OUT and metric in line.metrics
    ]
    if lines and responses is None:
        responses = lines[-1].metrics.get(Logged.RESPONSES)
    alike = [line for line in lines if line.metrics.get(Logged.RESPONSES) == responses]
    return {line.step: line.metrics[metric] for line in alike}


def best_of(scores: Mapping[int, float]) -> int | None:
    """Return the earliest version with the highest score; None where there is none."""
    return max(scores, key=lambda version: (scores[version], -version), default=None)


def cut_torn_end(path: Path) -> None:
    """Take half a line off the end of a file that lines are appended to. Raises OSError."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        raw = file.read()
        end = raw.rfind(b"\n") + 1
        if end < len(raw):
            file.truncate(end)


def _line(text: bytes) -> Line:
    values = json.loads(text)
    stage, step, metrics = values["stage"], values["step"], values["metrics"]
    if not isinstance(stage, str) or not isinstance(step, int):
        raise TypeError(f"stage {stage!r}, step {step!r}")
    numbers = {str(name): float(value) for name, value in metrics.items()}
    return Line(stage=stage, step=step, metrics=numbers, time=float(values.get("time", 0.0)))
