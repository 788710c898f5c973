"""Why a stage failed, in the run's events: for whoever was not there to read it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from common.errors import TalipotError
from common.files import one_line

_FAILED: Final = "failed"
_STOPPED: Final = "stopped"


def note_failure(events: Path, stage: str, error: Exception) -> None:
    """Append a line; where that cannot be, the error itself is what matters.

    Args:
        events: `RunFolder.events`.
        stage: that failed.
        error: why.
    """
    why = one_line(error)
    if not why.startswith(name := type(error).__name__) and not isinstance(error, TalipotError):
        why = f"{name}: {why}"
    _note(events, _FAILED, f"{stage}: {why}")


def note_untracked(events: Path, detail: str) -> None:
    """Append a line on metrics that a service did not take."""
    _note(events, "untracked", detail)


def note_restart(events: Path, detail: str) -> None:
    """Append a line on a learner that another takes the place of."""
    _note(events, "learner restarted", detail)


def note_lost(events: Path, detail: str) -> None:
    """Append a line on rollouts that are sampled again, because they were lost with a node."""
    _note(events, "rollouts lost", detail)


def note_health(events: Path, detail: str) -> None:
    """Append a line on what a health check has begun to find wrong."""
    _note(events, "health", detail)


def note_success(events: Path, stage: str) -> None:
    """Append a line where a failure is the last that is known: not every stage has other events."""
    if last_failure(events):
        _note(events, "ended", stage)


def _note(events: Path, what: str, detail: str) -> None:
    line = {"time": time.time(), "worker": "", "what": what, "detail": detail}
    with suppress(OSError), events.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")


def last_failure(events: Path) -> str:
    """Return stage and reason where a failure is the last that is known of a run; else empty.

    Workers that are stopped after it are a part of it.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):
        for text in reversed(events.read_bytes().splitlines()):
            line = json.loads(text)
            if line["what"] == _FAILED:
                return str(line["detail"])
            if line["what"] != _STOPPED:
                break
    return ""
