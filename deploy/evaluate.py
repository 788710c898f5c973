"""Comparison of two policies on held-out prompts: win rate, KL, length, variety, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file

from actors.prompts import EncodedPrompt, evaluation_requests
from common.config import RunConfig
from common.trajectory import Rollout, ScoredTrajectory, from_table
from common.weights import manifest_of, torch_dtype
from deploy.collector import Collector, Weights
from deploy.ledger import Ledger
from deploy.pool import Pool
from deploy.statistics import win_rate

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, responses) -> one number each; higher is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One policy's responses to the held-out prompts, in the prompts' order."""

    responses: list[str]
    scores: list[float]
    """By the run's own reward (the proxy)."""
    kl: list[float]
    """sum of (behavior_logprobs - ref_logprobs): one-sample estimate of KL to the reference."""
    nll: list[float]
    """Mean negative log-likelihood per token under the reference (supervised) policy."""
    lengths: list[int]
    """Response tokens."""


def policy_weights(config: RunConfig, path: Path, version: int) -> Weights:
    """A policy file's decoder as weights that actors can load."""
    state = load_file(path)
    palm = {k.removeprefix("palm."): v for k, v in state.items() if k.startswith("palm.")}
    manifest, payload = manifest_of(palm, version, torch_dtype(config.rollout.precision))
    return Weights(manifest=manifest, payloads=(ray.put(payload),))


def sample(
    config: RunConfig,
    weights: Weights,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    *,
    label: str,
    samples: int = 1,
) -> list[Rollout]:
    """Responses of one policy, `samples` per prompt side by side, unscored."""
    tables = _run(config, weights, prompts, rollout, None, label, samples)
    rows = [row for table in tables for row in from_table(ray.get(table), Rollout)]
    return sorted(rows, key=lambda row: row.rollout_id)


def sample_scored(
    config: RunConfig,
    weights: Weights,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    reward: Pool,
    *,
    label: str,
    samples: int = 1,
) -> Sampled:
    """Responses of one policy with their scores and log-probabilities under the reference."""
    tables = _run(config, weights, prompts, rollout, reward, label, samples)
    rows = [row for table in tables for row in from_table(ray.get(table), ScoredTrajectory)]
    rows.sort(key=lambda row: row.rollout_id)
    return Sampled(
        responses=[row.response_text for row in rows],
        scores=[row.score for row in rows],
        kl=[sum(row.behavior_logprobs) - sum(row.ref_logprobs) for row in rows],
        nll=[-sum(row.ref_logprobs) / len(row.ref_logprobs) for row in rows],
        lengths=[len(row.response_ids) for row in rows],
    )


def best_of(sampled: Sampled, n: int) -> list[str]:
    """The response with the highest score among every n of one prompt."""
    groups = range(0, len(sampled.responses), n)
    best = [max(range(at, at + n), key=sampled.scores.__getitem__) for at in groups]
    return [sampled.responses[index] for index in best]


def compare(
    prompts: Sequence[str], before: Sampled, after: Sampled, judge: Judge | None
) -> dict[str, float]:
    """Win rate of `after` over `before` (95 % interval, ties apart), KL, length, variety, NLL.

    Without a judge the run's own reward decides, which the policy was trained on.
    """
    if judge is None:
        old, new = before.scores, after.scores
    else:
        old = list(judge(prompts, before.responses))
        new = list(judge(prompts, after.responses))
    wins = win_rate(new, old, tie_margin=1e-6)
    found = {
        "win_rate": wins.rate,
        "win_rate_low": wins.low,
        "win_rate_high": wins.high,
        "ties_share": wins.ties_share,
        "judge_score_sft": _mean(old),
        "judge_score_policy": _mean(new),
        "kl": _mean(after.kl),
    }
    for name, sampled in (("sft", before), ("policy", after)):
        found |= {
            f"score_{name}": _mean(sampled.scores),
            f"nll_{name}": _mean(sampled.nll),
            f"response_length_{name}": _mean(sampled.lengths),
            f"distinct_{name}": len(set(sampled.responses)) / len(sampled.responses),
        }
    return found


def _run(
    config: RunConfig,
    weights: Weights,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    reward: Pool | None,
    label: str,
    samples: int,
) -> list[ray.ObjectRef[Any]]:
    """Move one pass over the prompts through the pools, with a ledger of its own."""
    ledger = Ledger()
    requests = evaluation_requests(prompts, seed=config.seed, label=label, samples=samples)
    ledger.issue(0, requests, config.rollout.lease_size)
    collector = Collector(
        ledger,
        rollout,
        reward,
        deadline_s=config.rollout.lease_deadline_s,
        merge=False,
        observe=lambda _: None,
    )
    collector.weights = weights
    while ledger.pending(0):
        collector.pump()
    return [s.table for s in collector.scored]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
