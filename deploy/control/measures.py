"""What an evaluation while training says, of the scored responses alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev

from common.config.run import RunConfig
from common.config.stages import EvaluateConfig
from common.metric_catalogue import Logged
from common.metrics import component_means, read
from common.wire.trajectory import ScoredTrajectory
from deploy.control.batches import solves


def evaluated(rows: Sequence[ScoredTrajectory], config: RunConfig) -> dict[str, float]:
    """Return what an evaluation found, of responses in rollout_id order."""
    settings, service = config.evaluate, config.reward_service
    sampled = [row for row in rows if not row.greedy]
    metrics = measured(sampled, settings.solved) if sampled else {}
    metrics |= measured_greedily([row for row in rows if row.greedy], settings.solved)
    for name in service.components.keys() - service.scoring.keys():
        silent = sum(name not in row.score_components for row in sampled)
        metrics[Logged.UNJUDGED.of(name)] = float(silent)
    told = _by_prompt(rows, settings)
    if len(told) > 1:
        metrics[Logged.METRIC_ERROR] = stdev(told) / len(told) ** 0.5
    return metrics


def measured(rows: Sequence[ScoredTrajectory], solved: float | None) -> dict[str, float]:
    """Return the metrics of scored responses, in rollout_id order.

    Args:
        rows: the responses; those to one prompt share their group.
        solved: score from which on a response has solved its prompt; None: no pass@k.
    """
    count = len(rows)
    metrics: dict[str, float] = {
        Logged.SCORE: sum(row.score for row in rows) / count,
        Logged.KL: sum(sum(row.policy_logprobs) - sum(row.ref_logprobs) for row in rows) / count,
        Logged.RESPONSE_LENGTH: sum(len(row.response_ids) for row in rows) / count,
        Logged.EOS_SHARE: sum(row.finish_reason != "length" for row in rows) / count,
    }
    of_source: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.source is not None:
            of_source[row.source.replace("/", ":")].append(row.score)
    for source, scores in sorted(of_source.items()):
        metrics[Logged.SOURCE_SCORE.of(source)] = sum(scores) / len(scores)
    metrics |= read(component_means(row.score_components for row in rows))
    if solved is None:
        return metrics
    groups: defaultdict[int, list[bool]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(solves(row.score, solved))
    k, most = 1, max(map(len, groups.values()))
    while k <= most:  # of prompts with fewer scored responses it is not known
        rates = [pass_at_k(len(of), sum(of), k) for of in groups.values() if len(of) >= k]
        metrics[Logged.PASS_AT.of(k)] = sum(rates) / len(rates)
        k *= 2
    return metrics


def measured_greedily(rows: Sequence[ScoredTrajectory], solved: float | None) -> dict[str, float]:
    """Return the metrics of greedy responses, one to each prompt; none of none."""
    if not rows:
        return {}
    metrics: dict[str, float] = {Logged.GREEDY_SCORE: sum(row.score for row in rows) / len(rows)}
    if solved is not None:
        metrics[Logged.GREEDY_SOLVED] = sum(solves(row.score, solved) for row in rows) / len(rows)
    return metrics


def _by_prompt(rows: Sequence[ScoredTrajectory], settings: EvaluateConfig) -> list[float]:
    """Return `evaluate.metric` of each prompt: their spread says how exactly the mean is known."""
    kind, _, of = settings.logged_metric.partition("/")
    greedy = kind.startswith("greedy_")
    groups: defaultdict[int, list[ScoredTrajectory]] = defaultdict(list)
    for row in rows:
        other = kind == "score" and of and (row.source or "").replace("/", ":") != of
        if bool(row.greedy) == greedy and not other:
            groups[row.group].append(row)
    if kind == "component":
        said = ([r.score_components.get(of) for r in group] for group in groups.values())
        known = ([value for value in values if value is not None] for values in said)
        return [fmean(values) for values in known if values]
    if settings.solved is None or kind in ("score", "greedy_score"):
        return [fmean(row.score for row in group) for group in groups.values()]
    limit = settings.solved
    solved = [[solves(row.score, limit) for row in group] for group in groups.values()]
    k = int(kind.partition("@")[2] or 1)
    return [pass_at_k(len(group), sum(group), k) for group in solved if len(group) >= k]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate that one of k samples solves a prompt of which c of n do.

    ``1 - C(n - c, k) / C(n, k)`` (Chen 2021, equation 1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
