"""How far a run is, as its folder alone tells: does it work, on what, and how long will it take.

::

    lock (who is at work) --+
    status.json (live) -----+--> Standing --> lines for people, JSON for programs
    metrics.jsonl, result.json

No cluster is asked, so one that is dying or is on another machine holds nobody up; who wants the
controller's own answer asks for it (`deploy.commands.ask_standing`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from common.config.run import RunConfig
from common.metric_catalogue import Logged
from common.metric_names import known_as
from deploy.health.checks import verdicts
from deploy.health.history import History, Verdict
from deploy.run_folder.activity import Span, spans_of
from deploy.run_folder.failures import last_failure
from deploy.run_folder.lock import Holder, at_work
from deploy.run_folder.log_lines import HELD_OUT, Line, Log, read_lines
from deploy.run_folder.progress import Told, is_final, recorded_facts, told
from deploy.screen import Part

_QUIET_S = 15.0
"""A run that has told nothing for so long is said to be silent; it tells something each second."""
_ITERATIONS_TIMED = 10
_WORKERS_SHOWN = 32
_GROUPS = {
    "loss": Logged.LOSS,
    "policy": Logged.SCORE,
    "sampler and learner": Logged.RATIO_DEVIATION,
    "updates": Logged.LR,
    "time": Logged.SECONDS,
    "workers": Logged.POLICY_VERSION,
}
"""Title -> the first metric of a group in the catalogue, whose order the groups keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is; with these names `talipot status --json` prints it."""

    run: str
    """Its folder."""
    state: Literal["running", "finished", "not running"]
    stage: str = ""
    """The stage that is at work, or that wrote the log's last line."""
    step: int = 0
    """Iterations or steps that are done of it."""
    steps: int | None = None
    """Of how many; None where nobody has said yet."""
    seconds_left: float | None = None
    """At the pace of the last iterations; None where that is not known."""
    writer: str = ""
    """Command, host, process and start of what is at work."""
    cluster: str = ""
    """Address of the Ray cluster that it is at work on."""
    told_seconds_ago: float | None = None
    """Age of the live figures; None where there are none."""
    told_at: float | None = None
    """When that was, in unix seconds, by the controller's clock."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last step, and the run's counts."""
    rollouts: Mapping[str, int] = field(default_factory=dict)
    """Issued, trained, dropped and in flight; only while policy training works."""
    workers: tuple[Mapping[str, Any], ...] = ()
    """Rollout actors and reward workers, likewise."""
    under_way: tuple[Span, ...] = ()
    """What workers and learner are at, until now."""
    health: tuple[Verdict, ...] = ()
    """What checks find wrong with policy training."""
    notes: tuple[str, ...] = ()
    """What is wrong else, and what to do next."""


def standing_of(config: RunConfig, log: Log | None = None, last: Told | None = None) -> Standing:
    """Look into a run's folder.

    Args:
        config: the run's.
        log: its log, where that was read already.
        last: what its controller has answered, where that was asked.

    Raises:
        DataError: its result is damaged.
    """
    holder = at_work(config.run_dir)
    log = read_lines(config.folder.metrics) if log is None else log
    if holder is None:
        return _at_rest(config, log)
    last = told(config.run_dir) if last is None else last
    if holder.stage == "train" and last is not None and last.token == holder.token:
        return _live(config, holder, last, log)
    line = _last(log, holder.stage)
    return Standing(
        run=str(config.run_dir),
        state="running",
        stage=holder.stage,
        step=line.step if line else 0,
        writer=str(holder),
        cluster=holder.cluster,
        metrics=line.metrics if line else {},
        notes=_damages(log),
    )


def _live(config: RunConfig, holder: Holder, last: Told, log: Log) -> Standing:
    facts, age = last.facts, max(0.0, time.time() - last.time)
    silent = f"it has told nothing for {_span(age)}: it hangs, or its machine or disk is gone"
    return Standing(
        run=str(config.run_dir),
        state="running",
        stage=holder.stage,
        step=facts["iteration"],
        steps=facts["iterations"],
        seconds_left=_seconds_left(config, log, facts["iterations"] - facts["iteration"]),
        writer=str(holder),
        cluster=holder.cluster,
        told_seconds_ago=age,
        told_at=last.time,
        metrics={**facts["metrics"], **facts["counts"]},
        rollouts={name: facts[name] for name in ("issued", "trained", "dropped", "in_flight")},
        workers=tuple(facts["workers"]),
        under_way=tuple(spans_of(facts.get("under_way", ()))),
        health=tuple(verdicts(History.of(config, log.lines, time.time(), holder.began))),
        notes=(*((silent,) if age > _QUIET_S else ()), *_damages(log)),
    )


def _at_rest(config: RunConfig, log: Log) -> Standing:
    facts, last = recorded_facts(config.run_dir), _last(log)
    iterations = config.train.iterations
    finished = is_final(facts, config)
    trained = last is not None and last.stage == "train"
    advice = f"`talipot train --resume {config.run_dir}` carries on with it"
    failure = last_failure(config.folder.events)
    return Standing(
        run=str(config.run_dir),
        state="finished" if finished else "not running",
        stage=last.stage if last else "",
        step=last.step if last else 0,
        steps=iterations if trained else None,
        metrics=last.metrics if last else {},
        health=tuple(verdicts(History.of(config, log.lines))),
        notes=(
            *(() if last else ("nothing is logged yet",)),
            *((f"failed in {failure}",) if failure and not finished else ()),
            *((advice,) if trained and not finished else ()),
            *_damages(log),
            *(("the log's last line has no end: its writer was killed at it",) if log.torn else ()),
        ),
    )


def _last(log: Log, stage: str = "") -> Line | None:
    """Return the last step of the log, or of one stage where that is in it."""
    steps = [line for line in log.lines if line.stage != HELD_OUT]
    own = [line for line in steps if line.stage == stage] or steps
    return own[-1] if own else None


def _damages(log: Log) -> tuple[str, ...]:
    return tuple(log.damaged[-1:])


def _seconds_left(config: RunConfig, log: Log, iterations: int) -> float | None:
    """Return the time that so many iterations take, and the evaluations among them."""
    took = _last_of(log, "train", Logged.SECONDS)
    evaluated = _last_of(log, HELD_OUT, Logged.EVALUATE_SECONDS)
    if not took:
        return None
    left = iterations * fmean(took)
    if config.evaluate.every and evaluated:
        every, last = config.evaluate.every, config.train.iterations
        due = last // every - (last - iterations) // every + bool(last % every)
        left += due * fmean(evaluated)
    return left


def _last_of(log: Log, stage: str, metric: Logged) -> list[float]:
    """Return a metric in the last steps of a stage that have it."""
    lines = (line.metrics for line in log.lines if line.stage == stage)
    return [metrics[metric] for metrics in lines if metric in metrics][-_ITERATIONS_TIMED:]


# ------------------------------------------------------------------ for people


def lines_of(standing: Standing) -> list[list[Part]]:
    """Write a standing out, in groups."""
    groups = {"": _head(standing)} | _metrics(standing) | {"who works": _workers(standing)}
    width = max(len(name) for group in groups.values() for name, _ in group)
    lines: list[list[Part]] = [[(standing.run, "italic")]]
    for title, rows in groups.items():
        if title and rows:
            lines.append([(f" {title}", "dim")])
        lines += [[f"   {name:<{width}}  ", (value, "bold")] for name, value in rows]
    for verdict in standing.health:
        style = "red" if verdict.severity == "critical" else "yellow"
        lines.append([(f" {verdict.severity} ", f"bold {style}"), verdict.evidence])
        lines.append([f"   {verdict.advice} ", (f"({verdict.section})", "dim")])
    return lines + [[(f" {note}", "yellow")] for note in standing.notes]


def _head(standing: Standing) -> list[tuple[str, str]]:
    done = str(standing.step) if standing.steps is None else f"{standing.step}/{standing.steps}"
    left, told_ago = standing.seconds_left, standing.told_seconds_ago
    rows = {
        "state": standing.state,
        "stage": standing.stage,
        "iteration" if standing.stage == "train" else "step": done if standing.stage else "",
        "time left": "" if left is None else f"about {_span(left)}",
        "at work": standing.writer,
        "cluster": standing.cluster,
        "told": "" if told_ago is None else f"{_span(told_ago)} ago",
        **{name.replace("_", " "): str(count) for name, count in standing.rollouts.items()},
    }
    return [(name, value) for name, value in rows.items() if value]


def _metrics(standing: Standing) -> dict[str, list[tuple[str, str]]]:
    """Group the metrics by the catalogue, and sort them as it does."""
    order = {metric: place for place, metric in enumerate(Logged)}
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in _GROUPS}
    known = {name: order[metric] for name in standing.metrics if (metric := known_as(name))}
    for name in sorted(known, key=lambda name: (known[name], name)):
        title = [title for title, first in _GROUPS.items() if order[first] <= known[name]][-1]
        groups[title].append((name, f"{standing.metrics[name]:.4g}"))
    other = sorted(standing.metrics.keys() - known.keys())
    return groups | {"other": [(name, f"{standing.metrics[name]:.4g}") for name in other]}


def _workers(standing: Standing) -> list[tuple[str, str]]:
    rows = []
    for worker in standing.workers[:_WORKERS_SHOWN]:
        place = f" · node {worker['node'][:8]} · process {worker['pid']}" if worker["pid"] else ""
        rows.append((worker["name"], f"{worker['state']}, {worker['calls']} under way{place}"))
    more = len(standing.workers) - _WORKERS_SHOWN
    return [*rows, ("more workers", str(more))] if more > 0 else rows


def _span(seconds: float) -> str:
    """Write a time out for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
