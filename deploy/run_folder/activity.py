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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TextIO

from common.errors import StorageError
from deploy.run_folder.log_lines import cut_torn_end

Doing = Literal[
    "loading", "sampling", "scoring", "evaluating", "learning", "auxiliary", "publishing", "saving"
]
LEARNER: Final = "learner"
"""Stands for all ranks, which work together."""
_MOST_BYTES: Final = 2_000_000
"""Of one file; some 25,000 calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of work without a break."""

    worker: str
    what: str
    """A `Doing`, where it was written by this version."""
    begin: float
    """Unix seconds, by the controller's clock."""
    end: float


Record = Callable[[Span], None]


def no_record(span: Span) -> None:
    """Ignore a span, where nobody wants to see it."""


class Activity:
    """Writes the file; one writer per run at a time."""

    def __init__(self, path: Path, most_bytes: int = _MOST_BYTES) -> None:
        """Go on with a run's file, from the first span that is added."""
        self._path, self._most_bytes = path, most_bytes
        self._file: TextIO | None = None

    def add(self, span: Span) -> None:
        """Append a span. Raises StorageError where the disk is full."""
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
        yield
        self.add(Span(worker=LEARNER, what=what, begin=begin, end=time.time()))

    def close(self) -> None:
        """Close the file. Raises OSError where the disk is full."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def read_activity(path: Path) -> list[Span]:
    """Read what is kept, in the order in which it ended; what is no line of it is left out."""
    found = []
    for part in (_before(path), path):
        with suppress(OSError):
            for text in part.read_bytes().splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    line = json.loads(text)
                    found.append(
                        Span(
                            worker=str(line["worker"]),
                            what=str(line["what"]),
                            begin=float(line["from"]),
                            end=float(line["to"]),
                        )
                    )
    return found


def _before(path: Path) -> Path:
    return path.with_name(f"{path.stem}.before{path.suffix}")
