"""Checks on the machinery: workers, progress, work thrown away, responses given up."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median

from common.metric_catalogue import Logged
from deploy.health.history import History, Said

_LOST, _LOST_WITHIN_S = 3, 600.0
_SILENT_ITERATIONS, _SILENT_S = 5, 120.0
_WASTED, _WAITING = 0.1, 0.6
_DEAD = 0.01
_WINDOW = 20


def workers(history: History) -> Said | None:
    """Tell of a learner that was built again, and of lost workers."""
    if restarts := _grown(history, Logged.LEARNER_RESTARTS, _WINDOW):
        return (
            "critical",
            f"restarts of the learner in the last {_WINDOW} iterations: {restarts:.0f}",
            "events.jsonl of the run says why; after learner.max_restarts of them the run ends",
        )
    end = history.iterations[-1].time
    recent = sum(line.time >= end - _LOST_WITHIN_S for line in history.iterations)
    lost = sum(_grown(history, name, recent) for name in _counts(history, "workers_lost/"))
    if lost < _LOST:
        return None
    begin = history.iterations[-recent - 1] if recent < len(history.iterations) else None
    minutes = (end - begin.time) / 60 if begin else 0.0
    within = f" within {minutes:.0f} minutes" if minutes else ""
    return (
        "warning",
        f"{lost:.0f} workers lost{within}",
        "`talipot status` shows the causes; no rollout was lost with them, and each costs a start",
    )


def progress(history: History) -> Said | None:
    """Tell that no iteration has ended for long."""
    if history.now is None:
        return None
    took = [line.metrics[Logged.SECONDS] for line in history.iterations[-_WINDOW:]]
    usual = median(took)
    evaluated = [m[Logged.EVALUATE_SECONDS] for m in _evaluations(history)]
    limit = max(_SILENT_ITERATIONS * usual, _SILENT_S) + 2 * max(evaluated, default=0.0)
    waited = history.now - max(history.iterations[-1].time, history.since)
    if waited <= limit:
        return None
    return (
        "critical",
        f"no iteration has ended for {waited:.0f} s, over {limit:.0f} (they took {usual:.0f})",
        "`talipot status` says who works on what; an auxiliary phase may take long",
    )


def _evaluations(history: History) -> list[Mapping[str, float]]:
    """Return the metrics of the last evaluations that say how long they took."""
    lines = history.held_out[-_WINDOW:]
    return [line.metrics for line in lines if Logged.EVALUATE_SECONDS in line.metrics]


def starvation(history: History) -> Said | None:
    """Tell that work is thrown away, or that the learner waits for rollouts."""
    if (wasted := _share(history, "dropped/stale", "resampled/stale")) > _WASTED:
        return (
            "warning",
            f"{wasted:.0%} of the rollouts of the last {_WINDOW} iterations were too old and "
            f"dropped or sampled again, over {_WASTED:.0%}",
            "raise train.max_staleness, or take fewer actors",
        )
    waits = history.last(Logged.COLLECT_SECONDS, _WINDOW)
    takes = history.last(Logged.SECONDS, _WINDOW)
    if not history.config.train.max_staleness or not waits or not takes:
        return None  # in synchronous mode it waits for each batch
    shares = [wait / max(take, 1e-9) for wait, take in zip(waits, takes, strict=True)]
    if min(shares) <= _WAITING:
        return None
    return (
        "warning",
        f"the learner waits for rollouts in {fmean(shares):.0%} of the time, over {_WAITING:.0%} "
        f"for {_WINDOW} iterations",
        "`talipot scale` adds rollout actors while it runs",
    )


def dead_letters(history: History) -> Said | None:
    """Tell that the reward service gives responses up."""
    share = _share(history, "dropped/dead letter")
    if share <= _DEAD:
        return None
    return (
        "warning",
        f"{share:.1%} of the rollouts of the last {_WINDOW} iterations were given up by what "
        f"scores them, over {_DEAD:.0%}",
        "the endpoint's failures are `http/NAME/failures`, and what was refused is in its "
        "dead_letters file",
    )


def _counts(history: History, kind: str) -> list[str]:
    """Return the counters of a kind that stand for all causes."""
    return [
        name
        for name in history.iterations[-1].metrics
        if name.startswith(kind) and name.count("/") == 1
    ]


def _grown(history: History, counter: str, iterations: int) -> float:
    """Return by how much a counter of the whole run has grown in the last iterations."""
    lines = history.iterations
    before = lines[-iterations - 1].metrics.get(counter, 0.0) if iterations < len(lines) else 0.0
    return lines[-1].metrics.get(counter, 0.0) - before


def _share(history: History, *counters: str) -> float:
    """Return the share of the last iterations' rollouts that such counters have counted."""
    lost = sum(_grown(history, counter, _WINDOW) for counter in counters)
    made = min(_WINDOW, len(history.iterations)) * history.config.train.batch_size
    return lost / max(made + lost, 1.0)
