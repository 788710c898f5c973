"""Is a run well? Checks over the history of its policy training, as pure functions.

A threshold of reinforcement learning counts iterations, which a monitoring system cannot. Each
check reads what `metrics.jsonl` has of the iterations so far and says nothing, or what is wrong, by
which figures, and what to do first; `docs/diagnosis.md` has a section for each. Terminal, status
and report show the same verdicts: these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from common.config.run import RunConfig
from common.metric_catalogue import Logged
from deploy.health import learning, machinery
from deploy.health.history import History, Said, Verdict

CHECKS: Mapping[str, Callable[[History], Said | None]] = {
    "over-optimisation": learning.over_optimisation,
    "kl": learning.kl,
    "update": learning.update,
    "mismatch": learning.mismatch,
    "entropy": learning.entropy,
    "length": learning.length,
    "signal": learning.signal,
    "value": learning.value,
    "gradient": learning.gradient,
    "workers": machinery.workers,
    "progress": machinery.progress,
    "starvation": machinery.starvation,
    "dead-letters": machinery.dead_letters,
}


_READ: Final = frozenset(
    {
        Logged.SCORE,
        Logged.SCORE_DEVIATION,
        Logged.EQUAL_GROUPS,
        Logged.KL,
        Logged.ENTROPY,
        Logged.RESPONSE_LENGTH,
        Logged.EOS_SHARE,
        Logged.MISMATCH_KL,
        Logged.CLIP_FRACTION,
        Logged.UPDATE_KL,
        Logged.GRADIENT_NORM,
        Logged.EXPLAINED_VARIANCE,
        Logged.SECONDS,
        Logged.COLLECT_SECONDS,
        Logged.EVALUATE_SECONDS,
        Logged.LEARNER_RESTARTS,
        Logged.METRIC_ERROR,
        Logged.RESPONSES,
    }
)
_READ_OF_KIND: Final = ("workers_lost/", "dropped/", "resampled/")


def what_checks_read(metrics: Mapping[str, float], config: RunConfig) -> dict[str, float]:
    """Return a step's metrics without what no check reads: a long run's history stays small."""
    held_out = config.evaluate.logged_metric
    return {
        name: value
        for name, value in metrics.items()
        if name in _READ or name == held_out or name.startswith(_READ_OF_KIND)
    }


def verdicts(history: History) -> list[Verdict]:
    """Return what is wrong, what is critical first; nothing before the first iteration."""
    if not history.iterations:
        return []
    last = history.iterations[-1].step
    found = []
    for name, check in CHECKS.items():
        if said := check(history):
            severity, evidence, advice = said
            verdict = Verdict(
                check=name, severity=severity, iteration=last, evidence=evidence, advice=advice
            )
            found.append(verdict)
    return sorted(found, key=lambda verdict: verdict.severity != "critical")
