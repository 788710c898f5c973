"""How far policy training is, in two files of a run's folder.

::

    controller --telling, once a second--> status.json --told--> talipot status
    controller --record, at the end------> result.json --recorded_facts--> resume, replay, status

Whoever asks how far a run is needs its folder and no cluster, which may be dying or on another
machine. What ``status.json`` holds belongs to one holding of the run's lock: with another token it
is of a writer that has ended.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from common.errors import DataError
from common.files import write_atomic
from common.run_folder import RunFolder
from deploy.run_folder.log_lines import best_of, held_out_scores

_EVERY_S = 1.0
_FACTS = {"iteration", "iterations", "issued", "trained", "dropped", "in_flight"}
_FACTS |= {"metrics", "counts", "workers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a run has told of itself last."""

    token: str
    """Of the lock's holder that told it."""
    time: float
    """Unix seconds."""
    facts: Mapping[str, Any]
    """The fields of `deploy.control.status.Status`."""


@contextmanager
def telling(path: Path, token: str, ask: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Write what `ask` answers, from a thread of its own, until the block ends, and then once more.

    A run whose disk is full ends by its own writing. This file only grows old meanwhile, which
    whoever reads it sees.
    """
    ended = threading.Event()

    def tell() -> None:
        text = json.dumps({"token": token, "time": time.time(), "facts": ask()})
        temporary = path.with_name(f"{path.name}.tmp")
        with suppress(OSError):
            temporary.write_text(text, encoding="utf8")
            temporary.replace(path)

    def go_on() -> None:
        tell()
        while not ended.wait(_EVERY_S):
            tell()

    thread = threading.Thread(target=go_on, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        tell()


def told(run_dir: Path) -> Told | None:
    """Return what a run has told last; None where it has told nothing that can be read."""
    try:
        last = Told(**json.loads(RunFolder(run_dir).status.read_text(encoding="utf8")))
        return last if last.facts.keys() >= _FACTS else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def record(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Write a finished run's facts. Raises StorageError when they cannot be written."""
    write_atomic(RunFolder(run_dir).result, [json.dumps(facts, indent=1).encode()])


def is_final(facts: Mapping[str, Any] | None, config: RunConfig) -> bool:
    """Whether a run that has recorded these facts has nothing more to train under this recipe.

    One that ended early goes on when the recipe is more patient now; and what it has recorded is of
    another time when it has gone on since.
    """
    if facts is None:
        return False
    iterations = facts["iterations"]
    if iterations >= config.train.iterations:
        return True
    later = [p for p in config.folder.checkpoints.glob("step-*") if not p.suffix]
    if max((p.name for p in later), default="") > config.folder.checkpoint(iterations).name:
        return False
    metric = config.evaluate.logged_metric
    scores = held_out_scores(config.folder.metrics, metric=metric).items()
    told = {version: score for version, score in scores if version <= iterations}
    return out_of_patience(told, config.evaluate.patience)


def out_of_patience(scores: Mapping[int, float], patience: int | None) -> bool:
    """Whether so many evaluations in a row were no better than one before them.

    Args:
        scores: by policy version.
        patience: `evaluate.patience`; None is without end.
    """
    best = best_of(scores)
    if patience is None or best is None:
        return False
    return sum(version > best for version in scores) >= patience


def recorded_facts(run_dir: Path) -> dict[str, Any] | None:
    """Return the facts of a finished run; None when it has not finished."""
    path = RunFolder(run_dir).result
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf8", errors="replace"))
    except ValueError as error:
        facts = error
    if not isinstance(facts, dict) or not isinstance(facts.get("iterations"), int):
        raise DataError(f"{path}: damaged; remove it and resume the run, which writes it")
    return facts
