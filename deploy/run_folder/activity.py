"""What workers and learner did and when, in activity.jsonl: for pictures, and bounded.

::

    collector (a lease, a scoring), controller (a phase) --Activity.add--> activity.jsonl
                                                 read_activity--> live page, report

A long run does more than anybody wants to keep, so only the newest part stays: a file that has
grown too large is put aside in the place of the one before it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TextIO

from common.errors import StorageError
from deploy.run_folder.log_lines import cut_torn_end

Doing = Literal[
    "starting",
    "loading",
    "sampling",
    "scoring",
    "evaluating",
    "learning",
    "auxiliary",
    "publishing",
    "saving",
]
LEARNER: Final = "learner"
"""Stands for all ranks, which work together."""
_MOST_BYTES: Final = 2_000_000
"""Of one file; some 25,000 calls."""
_READ_BYTES: Final = 500_000
"""What is read of them for a picture, again and again."""
_SHORT_S: Final = 1e-3
"""What took no longer is left out, such as the loading of weights that are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of work without a break."""

    worker: str
    what: str
    """A `Doing`, where it was written by this version."""
    begin: float
    """Unix seconds, by the controller's clock."""
    end: float


class Activity:
    """Writes the file, and knows what is under way; one writer per run at a time."""

    def __init__(self, path: Path | None = None, most_bytes: int = _MOST_BYTES) -> None:
        """Go on with a run's file, from the first span that is added; without one write nothing."""
        self._path, self._most_bytes = path, most_bytes
        self._file: TextIO | None = None
        self._under_way: dict[str, tuple[Doing, float]] = {}

    def begin(self, worker: str, what: Doing) -> None:
        """Note that a worker does this from now on."""
        self._under_way[worker] = what, time.time()

    def end(self, worker: str, what: Doing) -> None:
        """Note that a worker does this no more; it may have begun something else."""
        known = self._under_way.get(worker)
        if known is not None and known[0] == what:
            del self._under_way[worker]

    def under_way(self) -> list[Span]:
        """Return what is being done, until now; from any thread."""
        now = time.time()
        return [
            Span(worker=worker, what=what, begin=begin, end=now)
            for worker, (what, begin) in dict(self._under_way).items()
        ]

    def add(self, span: Span) -> None:
        """Append a span, unless it took no time. Raises StorageError where the disk is full."""
        if self._path is None or span.end - span.begin < _SHORT_S:
            return
        facts = {
            "worker": span.worker,
            "what": span.what,
            "from": round(span.begin, 3),
            "to": round(span.end, 3),
        }
        try:
            if self._file is None:
                cut_torn_end(self._path)
                self._file = self._path.open("a", encoding="utf8", buffering=1)
            self._file.write(json.dumps(facts) + "\n")
            if self._file.tell() > self._most_bytes:
                self.close()
                os.replace(self._path, _before(self._path))
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error}") from None

    @contextmanager
    def doing(self, what: Doing) -> Iterator[None]:
        """Add what the learner does, once it is done; nothing where it fails."""
        begin = time.time()
        self.begin(LEARNER, what)
        try:
            yield
        finally:
            self.end(LEARNER, what)
        self.add(Span(worker=LEARNER, what=what, begin=begin, end=time.time()))

    def close(self) -> None:
        """Close the file. Raises OSError where the disk is full."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def read_activity(path: Path, most_bytes: int = _READ_BYTES) -> list[Span]:
    """Read the newest part of what is kept, in the order in which it ended."""
    newest = _end_of(path, most_bytes)
    older = _end_of(_before(path), most_bytes - len(newest)) if len(newest) < most_bytes else b""
    # It may have been put aside between the two looks.
    whole = older if older.endswith(newest) else older + newest
    lines = []
    for text in whole.splitlines():
        with suppress(ValueError):  # the first and the last may be cut
            lines.append(json.loads(text))
    known: list[dict[str, Any]] = [line for line in lines if isinstance(line, dict)]
    return spans_of({**line, "begin": line.get("from"), "end": line.get("to")} for line in known)


def spans_of(told: Iterable[Mapping[str, Any]]) -> list[Span]:
    """Build spans of what was read; what is none, of another version for one, is left out."""
    found = []
    for line in told:
        with suppress(ValueError, TypeError, KeyError):
            found.append(
                Span(
                    worker=str(line["worker"]),
                    what=str(line["what"]),
                    begin=float(line["begin"]),
                    end=float(line["end"]),
                )
            )
    return found


def _end_of(path: Path, most_bytes: int) -> bytes:
    """Return the last bytes of a file; nothing where there is none."""
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most_bytes))
        return file.read(most_bytes)
    return b""


def _before(path: Path) -> Path:
    return path.with_name(f"{path.stem}.before{path.suffix}")
