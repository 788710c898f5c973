"""What the live page is told of a run, out of its folder alone."""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from common.config.run import RunConfig
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.errors import DataError
from common.metric_catalogue import Logged
from deploy.evaluation.facts import facts_of
from deploy.health.checks import CHECKS
from deploy.health.history import History
from deploy.run_folder.events import Happened, read_events
from deploy.run_folder.folder import config_of
from deploy.run_folder.log_lines import HELD_OUT, Follower, Line, Log
from deploy.samples import ORDERS, iteration_of, read_iteration
from deploy.standing import Standing, standing_of
from deploy.watch.panels import TABS, Columns, columns_of, drawn

_EVENTS: Final = 200
"""Of what has happened, the last so many are told."""
_ENDS: Final = {"left", "stopped", "died", "hung", "unstarted", "preempted", "corrupt"}
"""Events after which a worker is no more."""
_SAMPLES: Final = 40


class WatchedRun:
    """One run; safe to ask from several threads."""

    def __init__(self, folder: Path) -> None:
        """Watch a run's folder.

        Raises:
            DataError: it is none.
        """
        self.config = config_of(folder)
        self._recipe = self._recipe_time()
        self._log = Follower(self.config.folder.metrics)
        self._lock = threading.Lock()
        self._columns: tuple[tuple[int, int], Columns] | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.config.name

    def state(self) -> dict[str, Any]:
        """Return how far it is, its facts and its health; `version` tells when curves are new."""
        with self._lock:
            config, log = self._current(), self._log.log()
            standing = standing_of(config, log)
            facts = facts_of(config, log.lines)
        return {
            "name": self.name,
            "version": list(_version(log)),
            "standing": asdict(standing),
            "facts": facts,
            "tiles": _tiles(standing),
            "health": [{**asdict(v), "section": v.section} for v in standing.health],
            "checks": len(CHECKS) if any(line.stage == "train" for line in log.lines) else 0,
            "tabs": [tab for tab in TABS if self._has(tab, log)],
        }

    def panels(self, tab: str) -> dict[str, Any]:
        """Return a tab's curves. Raises KeyError where there is no such tab."""
        with self._lock:
            log = self._log.log()
            columns = self._columns_of(log)
        return {
            "version": list(_version(log)),
            "panels": [asdict(panel) for panel in drawn(tab, columns)],
        }

    def workers(self) -> dict[str, Any]:
        """Return each worker's life, and what has happened last."""
        with self._lock:
            config, log = self._current(), self._log.log()
            standing = standing_of(config, log)
        events = read_events(config.folder.events)
        at_work = {str(worker["name"]): worker for worker in standing.workers}
        times = sorted([line.time for line in log.lines] + [event.time for event in events])
        running = standing.state == "running"
        return {
            "lanes": _lanes(events, at_work if running else {}, times),
            "events": [asdict(event) for event in events[-_EVENTS:][::-1]],
        }

    def samples(self, iteration: int | None, order: str, seed: int) -> dict[str, Any]:
        """Return responses of an iteration, without their tokens, and score and length of all.

        Raises:
            TalipotError: no such iteration or order, or a damaged file.
        """
        logged = read_iteration(self.config, iteration)
        chosen = logged.samples(order=order, number=_SAMPLES, seed=seed)
        return {
            "iteration": logged.iteration,
            "orders": list(ORDERS),
            "lengths": logged.lengths,
            "scores": logged.scores,
            "samples": [asdict(sample) for sample in chosen],
        }

    def sample(self, rollout_id: str) -> dict[str, Any]:
        """Return one response token by token. Raises TalipotError where there is none."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self.config.folder.tokenizer)
        logged = read_iteration(self.config, iteration_of(rollout_id))
        return asdict(logged.sample(rollout_id, self._tokenizer))

    # ------------------------------------------------------------------ parts

    def _current(self) -> RunConfig:
        """Return the run's recipe, which a resumption may have changed."""
        if (now := self._recipe_time()) != self._recipe:
            with suppress(DataError):  # it is being written: the one before will do
                self.config, self._recipe = config_of(self.config.run_dir), now
        return self.config

    def _recipe_time(self) -> int:
        with suppress(OSError):
            return os.stat(self.config.folder.config).st_mtime_ns
        return 0

    def _columns_of(self, log: Log) -> Columns:
        """Return the log's columns, made once for each version of it."""
        if self._columns is None or self._columns[0] != _version(log):
            self._columns = _version(log), columns_of(_by_stage(self.config, log.lines))
        return self._columns[1]

    def _has(self, tab: str, log: Log) -> bool:
        stages = {stage for panel in TABS[tab] for stage in panel.stages}
        return any(line.stage in stages for line in log.lines)


def _version(log: Log) -> tuple[int, int]:
    """Tell one state of a log from another; a run that went back has more lines than before."""
    return len(log.lines), log.lines[-1].step if log.lines else 0


def _by_stage(config: RunConfig, lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Return the steps of each stage; of what was trained again the later line."""
    history = History.of(config, lines)
    found = {"train": history.iterations, HELD_OUT: history.held_out}
    for stage in ("sft", "reward"):
        found[stage] = list({line.step: line for line in lines if line.stage == stage}.values())
    return found


def _tiles(standing: Standing) -> list[dict[str, Any]]:
    """Choose what stands at the head of the page: what is known of these, as it was logged."""
    wanted = (
        (Logged.SCORE, "score"),
        (Logged.KL, "KL, nats"),
        (Logged.ENTROPY, "entropy, nats"),
        (Logged.RESPONSE_LENGTH, "tokens a response"),
        (Logged.LOSS, "loss"),
        (Logged.TOKENS_PER_SECOND, "tokens per second"),
        (Logged.SECONDS, "seconds an iteration"),
    )
    return [
        {"metric": str(metric), "title": title, "value": standing.metrics[metric]}
        for metric, title in wanted
        if metric in standing.metrics
    ]


def _lanes(
    events: Sequence[Happened],
    at_work: Mapping[str, Mapping[str, Any]],
    times: Sequence[float],
) -> list[dict[str, Any]]:
    """Return each worker's life: from when, in which states, until when and why.

    A name is given again when a run is resumed: what starts after an end is another worker. Where
    nobody was left to tell of a worker's end, as the run was killed, it is when the run told last.

    Args:
        events: of the run, in their order.
        at_work: the workers that there are, by their names.
        times: when the run told something, in their order.
    """
    lanes: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        name, what = event.worker, event.what
        spans = lanes.setdefault(name, [])
        if name and what in ("started", "draining", "waiting"):
            state = {"started": "working"}.get(what, what)
            _end(spans, _before(event.time, times) if what == "started" else event.time, "")
            spans.append({"from": event.time, "to": None, "state": state, "end": ""})
        elif name and what in _ENDS:
            why = f"{what}: {event.detail}" if event.detail else what
            _end(spans, event.time, why)
    begun = min((lanes[name][-1]["from"] for name in at_work if lanes.get(name)), default=math.inf)
    found = []
    for name in [*lanes, *(name for name in at_work if name not in lanes)]:
        worker, spans = at_work.get(name), lanes.get(name, [])
        if not spans and worker is None:
            continue  # a pool's own event, or one of the whole run
        if worker is None:
            _end(spans, _before(begun, times), "")
        found.append(
            {
                "name": name,
                "state": str(worker["state"]) if worker else "gone",
                "calls": int(worker["calls"]) if worker else 0,
                "node": str(worker["node"])[:8] if worker else "",
                "pid": int(worker["pid"]) if worker else 0,
                "spans": spans,
            }
        )
    return found


def _before(moment: float, times: Sequence[float]) -> float:
    """Return the last time before a moment, or the moment itself."""
    place = bisect_left(times, moment)
    return times[place - 1] if place else moment


def _end(spans: list[dict[str, Any]], when: float, why: str) -> None:
    """End what goes on, though never before its beginning."""
    if spans and spans[-1]["to"] is None:
        spans[-1]["to"], spans[-1]["end"] = max(when, spans[-1]["from"]), why
