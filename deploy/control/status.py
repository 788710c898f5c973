"""How far a run is while it works."""

from __future__ import annotations

from dataclasses import dataclass, field

from deploy.health.history import Verdict
from deploy.run_folder.activity import Span
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
    health: list[Verdict]
    """What is wrong, after the last iteration."""
    under_way: list[Span] = field(default_factory=list)
    """What workers and learner are at."""
