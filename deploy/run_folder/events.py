"""Reading a run's events.jsonl: what happened to its workers, its learner and its stages."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Cause = Literal["died", "hung", "unstarted", "preempted", "corrupt"]
"""How a worker was lost: what such an event is called."""
USUAL: Final = frozenset({"started", "stopped", "left", "ended"})
"""What happens in every run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """One line."""

    time: float
    """Unix seconds."""
    worker: str
    """Its name, or the pool's; empty of the whole run."""
    what: str
    detail: str


def read_events(path: Path) -> list[Happened]:
    """Read all lines, in their order; what is none, as half a line at the end, is left out."""
    found = []
    with suppress(OSError):
        for text in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                found.append(
                    Happened(
                        time=float(line["time"]),
                        worker=str(line["worker"]),
                        what=str(line["what"]),
                        detail=str(line["detail"]),
                    )
                )
    return found
