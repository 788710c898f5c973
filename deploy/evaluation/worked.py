"""What a report shows of who worked when, out of a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.run_folder import RunFolder
from deploy.lanes import lives_of, timeline_of, times_of
from deploy.run_folder.activity import read_activity
from deploy.run_folder.events import read_events
from deploy.run_folder.log_lines import Line


def drawn_timeline(folder: RunFolder, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return the lanes of the last iterations in percents of their time; None where none is kept.

    Args:
        folder: the run's.
        lines: of its log.
    """
    events = read_events(folder.events)
    lives = lives_of(events, {}, times_of(lines, events))
    timeline = timeline_of(read_activity(folder.activity), lives, lines)
    if timeline is None:
        return None
    begin, whole = timeline.begin, max(timeline.end - timeline.begin, 1e-9)

    def percent(seconds: float) -> str:
        return f"{100 * seconds / whole:.2f}"

    lanes = []
    for lane in timeline.lanes:
        own = sum(end - start for _, start, end in lane.spans)
        idle = sum(end - start for what, start, end in lane.spans if what == "idle")
        parts = [
            (what, percent(start - begin), percent(end - start)) for what, start, end in lane.spans
        ]
        lanes.append(
            {"name": lane.name, "words": lane.words, "parts": parts, "idle": f"{idle / own:.0%}"}
        )
    return {
        "lanes": lanes,
        "legend": timeline.legend,
        "roles": timeline.roles,
        "more": timeline.more,
        "ends": [percent(moment - begin) for moment in timeline.iterations],
    }
