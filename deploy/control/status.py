"""How far a run is while it works, and its facts once it has finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import write_atomic
from common.run_folder import RunFolder
from deploy.workers.scaling import WorkerView


@dataclass(slots=True, kw_only=True)
class Status:
    """How far a run is; what `talipot status` shows."""

    iteration: int = 0
    iterations: int = 0
    policy_version: int = 0
    metrics: dict[str, float]
    issued: int = 0
    trained: int = 0
    dropped: int = 0
    in_flight: int = 0
    rollout_workers: int = 0
    reward_workers: int = 0
    worker_failures: int = 0
    learner_restarts: int = 0
    counts: dict[str, float]
    """Losses by cause, reissues, staleness and the like, as in the metrics."""
    workers: list[WorkerView]


def record(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Write a finished run's facts. Raises StorageError when they cannot be written."""
    write_atomic(RunFolder(run_dir).result, [json.dumps(facts, indent=1).encode()])


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
