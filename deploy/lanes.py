"""Who worked when: each worker's life over a run, and what it did in the last iterations.

Made of what a run's folder says (events.jsonl, activity.jsonl, metrics.jsonl); pure functions, for
the live page and the report.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from deploy.run_folder.activity import LEARNER, Doing, Span
from deploy.run_folder.events import Cause, Happened
from deploy.run_folder.log_lines import Line

_LOST: Final = frozenset(get_args(Cause))
_ENDS: Final = _LOST | {"left", "stopped"}
"""Events after which a worker is no more."""
ITERATIONS: Final = 3
"""Whole iterations that a timeline begins before the newest."""
MOST_LANES: Final = 40
_MOST_SPANS: Final = 4000
_BREAK_S: Final = 300.0
"""Where nobody did anything for so long, the run was down."""
_ORDER: Final = (*get_args(Doing), "idle", "lost")
"""What a worker may be at, as legends have it."""


@dataclass(slots=True)
class Stretch:
    """A part of a worker's life; `end` is None where it goes on."""

    state: str
    begin: float
    end: float | None = None
    why: str = ""
    """What ended it."""


@dataclass(slots=True)
class Life:
    """A worker's life; of a name that was given again, all its lives."""

    name: str
    worker: Mapping[str, Any] | None
    """As status.json has it, while it is at work."""
    stretches: list[Stretch]


def lives_of(
    events: Sequence[Happened],
    at_work: Mapping[str, Mapping[str, Any]],
    times: Sequence[float],
) -> list[Life]:
    """Return each worker's life: from when, in which states, until when and why.

    A name is given again when a run is resumed: what starts after an end is another worker. Where
    nobody was left to tell of a worker's end, as the run was killed, it is when the run told last.

    Args:
        events: of the run, in their order.
        at_work: the workers that there are, by their names.
        times: when the run told something other than that a worker has started, in their order.
    """
    lives: dict[str, list[Stretch]] = {}
    for event in events:
        name, what = event.worker, event.what
        stretches = lives.setdefault(name, [])
        if name and what in ("started", "draining", "waiting"):
            state = {"started": "working"}.get(what, what)
            _end(stretches, _before(event.time, times) if what == "started" else event.time, "")
            stretches.append(Stretch(state, event.time))
        elif name and what in _ENDS:
            why = f"{what}: {event.detail}" if event.detail else what
            _end(stretches, event.time, why)
    begun = min((lives[name][-1].begin for name in at_work if lives.get(name)), default=math.inf)
    found = []
    for name in [*lives, *(name for name in at_work if name not in lives)]:
        worker, stretches = at_work.get(name), lives.get(name, [])
        if not stretches and worker is None:
            continue  # a pool's own event, or one of the whole run
        if worker is None:
            _end(stretches, _before(begun, times), "")
        found.append(Life(name, worker, stretches))
    return found


def times_of(lines: Sequence[Line], events: Sequence[Happened]) -> list[float]:
    """Return when a run told something that only who was at work can tell, in order."""
    told = [event.time for event in events if event.what != "started"]
    return sorted([line.time for line in lines] + told)


def _before(moment: float, times: Sequence[float]) -> float:
    """Return the last time before a moment, or the moment itself."""
    place = bisect_left(times, moment)
    return times[place - 1] if place else moment


def _end(stretches: list[Stretch], when: float, why: str) -> None:
    """End what goes on, though never before its beginning."""
    if stretches and stretches[-1].end is None:
        stretches[-1].end, stretches[-1].why = max(when, stretches[-1].begin), why


# ------------------------------------------------------------------ what they did


@dataclass(frozen=True, slots=True)
class Lane:
    """What one worker was at, without gaps while it lived."""

    name: str
    spans: list[tuple[str, float, float]]
    """What, from when, until when; in their order."""
    words: str
    """The same for whoever does not see a picture: the share of its time, by what it was at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What everybody was at, in a window of time."""

    begin: float
    end: float
    """Unix seconds."""
    iterations: list[float]
    """When iterations ended in it."""
    legend: list[str]
    """What somebody was at."""
    lanes: list[Lane]
    """The learner's, and those of the first `MOST_LANES` workers."""
    more: int
    """Workers that are not among them."""
    roles: dict[str, str]
    """As `Lane.words`, of all workers of a role."""


def timeline_of(
    spans: Sequence[Span], lives: Sequence[Life], lines: Sequence[Line], now: float | None = None
) -> Timeline | None:
    """Return what was done in the last iterations; None where nothing is known of it.

    Args:
        spans: what was recorded.
        lives: of the workers.
        lines: of the run's log.
        now: the moment, of a run that is at work; None takes the last that is known.
    """
    if not spans:
        return None
    ended = [line.time for line in lines if line.stage == "train"]
    end = max([*(span.end for span in spans[-100:]), *ended[-1:]]) if now is None else now
    kept = sorted(spans, key=lambda span: span.end)[-_MOST_SPANS:]
    # The iteration under way is one more.
    whole = ended[-ITERATIONS - 1 :] if len(ended) > ITERATIONS else []
    begin = max([_sitting(kept), *whole[:1]])
    if len(spans) > _MOST_SPANS:
        begin = max(begin, kept[0].end)
    if end <= begin:
        return None
    done: defaultdict[str, list[Span]] = defaultdict(list)
    for span in kept:
        if span.end > begin and span.begin < end:
            done[span.worker].append(span)
    known = {life.name: life for life in lives}
    lanes: list[Lane] = []
    of_roles: dict[str, defaultdict[str, float]] = {}
    for name in sorted({*done, *known}, key=_order):
        stretches = known[name].stretches if name in known else [Stretch("working", begin)]
        if filled := _filled(done[name], stretches, begin, end):
            of_role = of_roles.setdefault(name.rpartition("-")[0] or name, defaultdict(float))
            own: defaultdict[str, float] = defaultdict(float)
            for what, start, stop in filled:
                own[what] += stop - start
                of_role[what] += stop - start
            lanes.append(Lane(name, filled, _words(own)))
    there = {what for times in of_roles.values() for what in times}
    return Timeline(
        begin=begin,
        end=end,
        iterations=[moment for moment in ended if begin <= moment <= end],
        legend=sorted(there, key=_place),
        lanes=lanes[: MOST_LANES + 1],
        more=max(0, len(lanes) - MOST_LANES - 1),
        roles={role: _words(times) for role, times in of_roles.items()},
    )


def _sitting(spans: Sequence[Span]) -> float:
    """Return since when somebody worked without a long break: a run may be resumed days later."""
    known = sorted(spans, key=lambda span: span.begin)
    first, until = known[0].begin, known[0].end
    for span in known[1:]:
        if span.begin > until + _BREAK_S:
            first = span.begin
        until = max(until, span.end)
    return first


def _filled(
    done: Sequence[Span], stretches: Sequence[Stretch], begin: float, end: float
) -> list[tuple[str, float, float]]:
    """Return what was done in a window, idle between it, and lost after a loss."""
    found: list[tuple[str, float, float]] = []
    for place, stretch in enumerate(stretches):
        until = end if stretch.end is None else stretch.end
        following = stretches[place + 1].begin if place + 1 < len(stretches) else end
        at, last = max(begin, stretch.begin), min(end, until)
        for span in sorted(done, key=lambda span: span.begin):
            start, stop = max(at, span.begin), min(last, span.end)
            if stop <= start:
                continue
            if start > at:
                found.append(("idle", at, start))
            found.append((span.what, start, stop))
            at = stop
        if last > at:
            found.append(("idle", at, last))
        if stretch.why.partition(":")[0] in _LOST and begin <= until < end:
            found.append(("lost", until, min(end, following)))
    return found


def _words(seconds: Mapping[str, float]) -> str:
    """Write shares of time out, in the order of legends."""
    total = sum(seconds.values())
    shares = [(what, seconds[what] / total) for what in sorted(seconds, key=_place)]
    return ", ".join(
        f"{what} {share:.0%}" if share >= 0.005 else f"{what} < 1%" for what, share in shares
    )


def _place(what: str) -> int:
    """Return where legends have it; last what another version knew."""
    return _ORDER.index(what) if what in _ORDER else len(_ORDER)


def _order(name: str) -> tuple[bool, str, int]:
    """Sort the learner first, and rollout-2 before rollout-10."""
    role, _, number = name.rpartition("-")
    return name != LEARNER, role, int(number) if number.isdigit() else 0
