"""What the live page is told of a run, out of its folder alone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from common.config.run import RunConfig
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.errors import DataError
from common.metric_catalogue import Logged
from deploy.evaluation.facts import facts_of
from deploy.feedback.rounds import round_of, rounds_of
from deploy.feedback.standing import COLUMNS
from deploy.feedback.standing import standing_of as round_standing
from deploy.health.checks import CHECKS
from deploy.health.history import History
from deploy.lanes import Life, lives_of, timeline_of, times_of
from deploy.run_folder.activity import read_activity
from deploy.run_folder.events import read_events
from deploy.run_folder.folder import config_of
from deploy.run_folder.log_lines import HELD_OUT, Follower, Line, Log
from deploy.samples import ORDERS, iteration_of, read_iteration
from deploy.standing import Standing, standing_of
from deploy.watch.panels import TABS, Columns, columns_of, drawn

_EVENTS: Final = 200
"""Of what has happened, the last so many are told."""
_SAMPLES: Final = 40
_FEEDBACK_S: Final = 3.0
"""Between looks at a round of feedback, all of which is read each time."""


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
        self._feedback: tuple[float, list[str], dict[str, Any]] | None = None

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
        told = self.told_of_feedback()
        return {
            "name": self.name,
            "version": list(_version(log)),
            "feedback": told,
            "standing": asdict(standing),
            "facts": facts,
            "tiles": _tiles(standing),
            "health": [{**asdict(v), "section": v.section} for v in standing.health],
            "checks": len(CHECKS) if any(line.stage == "train" for line in log.lines) else 0,
            "tabs": [tab for tab in TABS if self._has(tab, log)] + ["feedback"] * bool(told),
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
        """Return each worker's life, what it did in the last iterations, and what has happened."""
        with self._lock:
            config, log = self._current(), self._log.log()
            standing = standing_of(config, log)
        events = read_events(config.folder.events)
        at_work = {str(worker["name"]): worker for worker in standing.workers}
        running = standing.state == "running"
        lives = lives_of(events, at_work if running else {}, times_of(log.lines, events))
        done = [*read_activity(config.folder.activity), *standing.under_way]
        timeline = timeline_of(done, lives, log.lines, standing.told_at if running else None)
        return {
            "lanes": [_lane(life) for life in lives],
            "timeline": None if timeline is None else asdict(timeline),
            "events": [asdict(event) for event in events[-_EVENTS:][::-1]],
        }

    def feedback(self) -> dict[str, Any]:
        """Return how the newest round of feedback is. Raises TalipotError where it is damaged."""
        folder, settings = round_of(self._current().folder, None)
        told = self.told_of_feedback()
        with self._lock:
            known = self._feedback
        if known is None or (known[1] != told and time.monotonic() - known[0] > _FEEDBACK_S):
            standing = round_standing(folder, settings)
            facts = {
                **standing.facts(),
                "columns": list(COLUMNS),
                "rows": standing.rows(),
                "rounds": rounds_of(self.config.folder),
                "told": told,
            }
            known = time.monotonic(), told, facts
            with self._lock:
                self._feedback = known
        return known[2]

    def told_of_feedback(self) -> list[str]:
        """Tell one state of the newest round from another; empty where there is none.

        Its pace changes with time, too.
        """
        numbers = rounds_of(self.config.folder)
        if not numbers:
            return []
        answers = self.config.folder.round(numbers[-1]).answers
        found = [numbers[-1], int(time.time() // 60)]
        for path in (answers, answers.with_name(f"{answers.name}-wal")):
            with suppress(OSError):
                found += [path.stat().st_mtime_ns, path.stat().st_size]
        return list(map(str, found))

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


def _lane(life: Life) -> dict[str, Any]:
    """Return a life as the page takes it."""
    worker = life.worker
    return {
        "name": life.name,
        "state": str(worker["state"]) if worker else "gone",
        "calls": int(worker["calls"]) if worker else 0,
        "node": str(worker["node"])[:8] if worker else "",
        "pid": int(worker["pid"]) if worker else 0,
        "spans": [
            {"from": part.begin, "to": part.end, "state": part.state, "end": part.why}
            for part in life.stretches
        ],
    }
