"""What a run's processes tell between the steps of its log, as Ray's metrics; no log has these.

The log's own metrics are in `common.metric_catalogue`.
"""

from __future__ import annotations

from common.metric_facts import Catalogue, counter, gauge


class Live(Catalogue):
    """The metrics; each is told again every few seconds while its process lives."""

    BUSY_SECONDS = counter(
        "busy_seconds/{role}/{worker}",
        "seconds",
        "time that it sampled, scored or trained, the call under way included",
        look_for="its rate is the share of time that a process works",
    )
    CALLS = counter(
        "calls/{role}/{worker}", "calls", "leases, scorings or phases that it has ended"
    )
    TOKENS = counter(
        "tokens/{role}/{worker}",
        "tokens",
        "response tokens sampled (rollout), scored (reward) or trained on (rank 0 of the learner "
        "counts those of all)",
    )
    HELD_VERSION = gauge(
        "held_version/{worker}",
        "versions",
        "version of the weights that a rollout actor holds, -1 while it has none or loads",
        look_for="behind `policy_version` for long: it gets no leases",
    )
    RESIDENT_BYTES = gauge(
        "resident_bytes/{role}/{worker}", "bytes", "memory that its process holds"
    )
    ITERATION_END = gauge(
        "iteration_end",
        "seconds since 1970",
        "when the last iteration ended, with its evaluation and checkpoint, or policy training "
        "began",
    )
    HEALTH = gauge(
        "health/{check}/{severity}",
        "1",
        "1 where a check finds something wrong with the run (docs/diagnosis.md)",
    )
