"""Comparison of two policies on held-out prompts: win rate, KL, length, variety, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.errors import RewardError
from common.models.adapter_files import load_peft, put_adapter, require_base
from common.models.adapters import adapter_tensors, add_adapter, base_fingerprint
from common.models.build import build_decoder
from common.models.lora import OFF
from common.models.weight_files import load_decoder
from common.run_folder import PolicyFolder
from common.wire.trajectory import Rollout, ScoredTrajectory, from_table
from common.wire.weights import manifest_of, torch_dtype
from deploy.control.collector import Collector
from deploy.control.jobs import Weights
from deploy.control.ledger import Ledger
from deploy.evaluation.intervals import win_rate
from deploy.workers.pool import Pool

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]
"""(prompts, responses) -> one number each, higher is better; None where it has no opinion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One policy's scored responses to the held-out prompts, in the prompts' order.

    What the reward refused to score is not among them: `prompts` says what each one answers.
    """

    prompts: list[int]
    """Index of the prompt that each response answers, ascending."""
    responses: list[str]
    scores: list[float]
    """By the run's own reward (the proxy)."""
    kl: list[float]
    """sum of (policy_logprobs - ref_logprobs): one-sample estimate of KL to the reference, both
    without a filter and at the sampling temperature (1 where that is greedy)."""
    nll: list[float]
    """Mean negative log-likelihood per token under the reference (supervised) policy, likewise."""
    lengths: list[int]
    """Response tokens."""

    def pick(self, rows: Sequence[int]) -> Sampled:
        """Some of the responses, in the order given."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Sampled(**{name: [values[i] for i in rows] for name, values in columns.items()})


def policy_weights(config: RunConfig, path: Path, version: int) -> Weights:
    """A policy file's decoder as weights that actors can load.

    Where those hold the supervised policy as a base, what they load is an adapter on it: that of
    the policy, or for the supervised policy itself one that changes nothing.

    Raises:
        CheckpointError: missing, torn, or an adapter of another base.
    """
    dtype = torch_dtype(config.rollout.precision)
    lora, name = config.train.lora, config.train.adapter
    decoder = build_decoder(config.model)
    if lora is None:
        load_decoder(decoder, path)
        state: dict[str, Tensor] = dict(decoder.named_parameters())
        fingerprint = ""
    else:
        base = config.folder.sft.weights
        load_decoder(decoder, base)
        fingerprint = base_fingerprint(decoder.state_dict())
        if path.absolute() == base.absolute():
            add_adapter(decoder, name, lora, seed=0)
        else:
            folder = PolicyFolder(path.parent).adapter
            adapter = load_peft(folder, decoder)
            require_base(adapter, fingerprint, folder)
            put_adapter(decoder, name, adapter)
        state = dict(adapter_tensors(decoder, name))
    manifest, payload = manifest_of(state, version, dtype, fingerprint)
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
    adapters = (config.train.adapter,)
    tables = _run(config, weights, prompts, rollout, None, label, samples, adapters)
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
    adapters = (config.train.adapter,)
    tables = _run(config, weights, prompts, rollout, reward, label, samples, adapters)
    return _sampled(_scored(tables))


def sample_both(
    config: RunConfig,
    sft: Path,
    policy: Path,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    reward: Pool,
    *,
    label: str,
) -> tuple[Sampled, Sampled]:
    """Responses of the supervised and of the trained policy, from the same seeds.

    Where the one is the base of the other's adapter, side by side: each lease is of both, and no
    weights change in between. Native kernels, where the recipe insists on them, hold one policy at
    a time, as actors of whole weights do; then the policies take turns.
    """
    new = config.train.adapter
    if new == OFF or config.rollout.kernels == "native":
        turns = [policy_weights(config, path, at) for at, path in enumerate((sft, policy))]
        before, after = (
            sample_scored(config, weights, prompts, rollout, reward, label=label)
            for weights in turns
        )
        return before, after
    weights = policy_weights(config, policy, 1)
    rows = _scored(_run(config, weights, prompts, rollout, reward, label, 1, (OFF, new)))
    before, after = (_sampled([r for r in rows if r.adapter == name]) for name in (OFF, new))
    return before, after


def _scored(tables: Sequence[ray.ObjectRef[Any]]) -> list[ScoredTrajectory]:
    """The rows of tables in the order they were asked for."""
    rows = [row for table in tables for row in from_table(ray.get(table), ScoredTrajectory)]
    return sorted(rows, key=lambda row: row.rollout_id)


def _sampled(rows: Sequence[ScoredTrajectory]) -> Sampled:
    return Sampled(
        prompts=[row.group for row in rows],
        responses=[row.response_text for row in rows],
        scores=[row.score for row in rows],
        kl=[sum(row.policy_logprobs) - sum(row.ref_logprobs) for row in rows],
        nll=[-sum(row.ref_logprobs) / len(row.ref_logprobs) for row in rows],
        lengths=[len(row.response_ids) for row in rows],
    )


def best_of(sampled: Sampled) -> Sampled:
    """The response with the highest score of each prompt that has one."""
    best: dict[int, int] = {}
    for row, prompt in enumerate(sampled.prompts):
        if prompt not in best or sampled.scores[row] > sampled.scores[best[prompt]]:
            best[prompt] = row
    return sampled.pick(list(best.values()))


def paired(before: Sampled, after: Sampled) -> tuple[Sampled, Sampled]:
    """Both sides' responses to the prompts that both have one to.

    Raises:
        RewardError: there is no such prompt.
        ValueError: a side has several responses to a prompt (`best_of` chooses one).
    """
    old, new = ({prompt: at for at, prompt in enumerate(s.prompts)} for s in (before, after))
    if (len(old), len(new)) != (len(before.prompts), len(after.prompts)):
        raise ValueError("responses are compared one to one, and a prompt has several")
    common = sorted(old.keys() & new.keys())
    if not common:
        raise RewardError(
            f"evaluation: nothing to compare; {len(old)} responses of the supervised policy and "
            f"{len(new)} of the trained one have a score, and no two of the same prompt"
        )
    return before.pick([old[p] for p in common]), after.pick([new[p] for p in common])


def compare(
    prompts: Sequence[str], before: Sampled, after: Sampled, judge: Judge | None
) -> dict[str, float]:
    """Win rate of `after` over `before` (95 % interval, ties apart), KL, length, variety, NLL.

    All figures are of the same prompts, `pairs_judged` of the `pairs_asked`: those of which both
    policies' responses have a score, and the judge an opinion. Without a judge the run's own reward
    decides, which the policy was trained on.

    Raises:
        RewardError: no pair is left.
    """
    before, after = paired(before, after)
    opinions = zip(*(_opinions(prompts, side, judge) for side in (before, after)), strict=True)
    old, new, judged = list[float](), list[float](), list[int]()
    for row, (was, now) in enumerate(opinions):
        if was is not None and now is not None:
            judged.append(row)
            old.append(was)
            new.append(now)
    if not judged:
        raise RewardError(
            f"evaluation: nothing to compare; evaluate.judge has an opinion of both responses of "
            f"none of {len(before.prompts)} prompts"
        )
    before, after = before.pick(judged), after.pick(judged)
    wins = win_rate(new, old, tie_margin=1e-6)
    found = {
        "pairs_judged": len(judged),
        "pairs_asked": len(prompts),
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


def _opinions(
    prompts: Sequence[str], sampled: Sampled, judge: Judge | None
) -> Sequence[float | None]:
    """The judge's number for each response, or its score."""
    if judge is None:
        return sampled.scores
    return judge([prompts[i] for i in sampled.prompts], sampled.responses)


def _run(
    config: RunConfig,
    weights: Weights,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    reward: Pool | None,
    label: str,
    samples: int,
    adapters: Sequence[str],
) -> list[ray.ObjectRef[Any]]:
    """Move one pass over the prompts through the pools, with a ledger of its own.

    Raises:
        RewardError: not one response was scored.
    """
    ledger = Ledger()
    requests = evaluation_requests(
        prompts, seed=config.seed, label=label, samples=samples, adapters=adapters
    )
    ledger.issue(0, requests, config.rollout.lease_size)
    collector = Collector(
        ledger,
        rollout,
        reward,
        deadline_s=config.rollout.lease_deadline_s,
        score_together=False,
    )
    collector.weights = weights
    while ledger.pending(0):
        collector.pump()
    if not collector.batches.waiting:
        raise RewardError(
            f"evaluation: every one of {len(requests)} responses was given up by the reward "
            f"service; the last: {collector.last_dead_letter}"
        )
    return [s.table for s in collector.batches.waiting]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
