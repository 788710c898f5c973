"""Is a run well? Checks over the history of its policy training, as pure functions.

A threshold of reinforcement learning counts iterations, which a monitoring system cannot. Each
check reads what `metrics.jsonl` has of the iterations so far and says nothing, or what is wrong, by
which figures, and what to do first; `docs/diagnosis.md` has a section for each. Terminal, status
and report show the same verdicts: these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
