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
    """Tell of lost workers and of a learner that was built again."""
    restarts = history.last(Logged.LEARNER_RESTARTS, 1)
    if restarts and restarts[-1] > 0:
        return (
            "critical",
            f"restarts of the learner: {restarts[-1]:.0f}",
            "events.jsonl of the run says why; learner.max_restarts ends the run at some time",
        )
    recent = [
        line
        for line in history.iterations
        if line.time >= history.iterations[-1].time - _LOST_WITHIN_S
    ]
    begin = history.iterations[-len(recent) - 1] if len(recent) < len(history.iterations) else None
    lost = _lost(history.iterations[-1].metrics) - (_lost(begin.metrics) if begin else 0.0)
    if lost >= _LOST:
        return (
            "warning",
            f"{lost:.0f} workers lost within {_LOST_WITHIN_S / 60:.0f} minutes",
            "`talipot status` shows the causes; nothing was lost with them, and each costs a start",
        )
    return None


def progress(history: History) -> Said | None:
    """Tell that no iteration has ended for long."""
    if history.now is None:
        return None
    took = [line.metrics[Logged.SECONDS] for line in history.iterations[-_WINDOW:]]
    usual = median(took)
    limit = max(_SILENT_ITERATIONS * usual, _SILENT_S)
    waited = history.now - history.iterations[-1].time
    if waited <= limit:
        return None
    return (
        "critical",
        f"no iteration has ended for {waited:.0f} s, over {limit:.0f} (they took {usual:.0f})",
        "`talipot status` says who works on what; an auxiliary phase may take long",
    )


def starvation(history: History) -> Said | None:
    """Tell that work is thrown away, or that the learner waits for rollouts."""
    if (wasted := _share(history, ("dropped/", "resampled/"), "stale")) > _WASTED:
        return (
            "warning",
            f"{wasted:.0%} of rollouts were too old and dropped or sampled again, over "
            f"{_WASTED:.0%}",
            "raise train.max_staleness, or take fewer actors",
        )
    waits, takes = (
        history.last(Logged.COLLECT_SECONDS, _WINDOW),
        history.last(Logged.SECONDS, _WINDOW),
    )
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
    share = _share(history, ("dropped/",), "dead letter")
    if share <= _DEAD:
        return None
    return (
        "warning",
        f"{share:.1%} of rollouts were given up by what scores them, over {_DEAD:.0%}",
        "the endpoint's failures are `http/NAME/failures`, and what was refused is in its "
        "dead_letters file",
    )


def _lost(metrics: Mapping[str, float]) -> float:
    """Count the workers lost so far, over both pools."""
    return sum(
        count
        for name, count in metrics.items()
        if name.startswith("workers_lost/") and name.count("/") == 1
    )


def _share(history: History, kinds: tuple[str, ...], reason: str) -> float:
    """Return the share of rollouts that went one way, over the run."""
    last = history.iterations[-1]
    of = sum(last.metrics.get(f"{kind}{reason}", 0.0) for kind in kinds)
    train = history.config.train
    made = last.step * train.prompts_per_iteration * train.samples_per_prompt
    return of / max(made + of, 1.0)
