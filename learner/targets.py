"""From a batch to what a policy phase optimises: rewards, advantages, value targets.

All of it is computed on the whole batch, the same on every rank, before the first step.
Shape suffixes: N rows of the whole batch, R response positions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.config.stages import TrainConfig
from common.metric_catalogue import Logged
from common.metrics import Metrics, component_means, mean
from learner.algorithms import gae, ppo, rewards
from learner.algorithms.estimators import ESTIMATORS, Estimate, Outcomes
from learner.algorithms.kl import kl_k1
from learner.algorithms.surrogates import mismatch_weights
from learner.batch.experience import Experience
from learner.batch.trajectory_log import Learnt
from learner.objectives.policy import PolicyTargets
from learner.objectives.value import ValueTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Proximal:
    """What policy and value function say of a batch before the first step, float32."""

    logprobs_NR: Tensor
    """Of the distribution that tokens are sampled from: what ratios are taken to."""
    unfiltered_NR: Tensor
    """Before the filter: what the KL to the reference is taken from."""
    entropy_NR: Tensor
    head_values_NR: Tensor
    """By the policy's own head."""
    values_NR: Tensor
    """By the value function; zeros of an algorithm that has none."""


def kl_of(batch: Experience, proximal: Proximal) -> float:
    """Return the KL to the reference policy, summed over the batch, in nats."""
    apart_NR = proximal.unfiltered_NR.double() - batch.reference_NR.double()
    return float((kl_k1(apart_NR) * batch.mask_NR).sum())


def rewards_of(
    batch: Experience, proximal: Proximal, config: RunConfig, kl_coef: float
) -> rewards.Rewards:
    """Return scores and penalties per token.

    In float64: what a large score and a small penalty add up to must not be rounding.

    Args:
        batch: the trajectories.
        proximal: what the policy says of them.
        config: whether a response that never ended is penalised, or one that is long.
        kl_coef: weight of the KL to the reference policy.
    """
    settings, scores_N = config.train, batch.scores_N.double()
    if (overlong := settings.objective.overlong) is not None:
        scores_N = scores_N - rewards.overlong_penalty(
            batch.mask_NR.sum(dim=1),
            longest=config.rollout.max_response_tokens,
            buffer=overlong.buffer,
            penalty=overlong.penalty,
        )
    if settings.missing_eos_penalty is not None:
        scores_N = rewards.apply_eos_trick(
            scores_N, batch.ended_N, penalty=settings.missing_eos_penalty
        )
    return rewards.reward_parts(
        scores_N,
        proximal.unfiltered_NR.double(),
        batch.reference_NR.double(),
        batch.mask_NR,
        kl_coef=kl_coef,
        token_scores_BR=batch.token_scores_NR,
    )


def estimate_of(
    batch: Experience, proximal: Proximal, shaped: rewards.Rewards, settings: TrainConfig
) -> Estimate:
    """Return advantages and value targets by the algorithm's estimator."""
    return ESTIMATORS[settings.algorithm](
        Outcomes(
            rewards=shaped,
            values_BR=proximal.values_NR,
            groups_B=batch.groups_N,
            mask_BR=batch.mask_NR,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            value_lambda=settings.value_lambda,
            length_alpha=settings.gae_length_alpha,
        )
    )


def value_targets(
    batch: Experience, proximal: Proximal, estimate: Estimate, settings: TrainConfig
) -> ValueTargets | None:
    """Return what the value function learns; None of an algorithm that has none."""
    returns_NR = estimate.returns_BR
    if returns_NR is None:
        return None
    unit = ppo.value_unit(proximal.values_NR, returns_NR, batch.mask_NR)
    share = settings.value_clip_range
    return ValueTargets(
        returns_NR=returns_NR.float(),
        old_values_NR=proximal.values_NR,
        unit=unit,
        clip_range=None if share is None else share * unit,
    )


def policy_targets(
    batch: Experience,
    proximal: Proximal,
    estimate: Estimate,
    values: ValueTargets | None,
    config: RunConfig,
) -> PolicyTargets:
    """Return what the policy learns, and its own head where that is the value function."""
    settings, importance_NR = config.train, None
    if config.corrects_mismatch:
        importance_NR = mismatch_weights(
            proximal.logprobs_NR - batch.behavior_NR,
            batch.mask_NR,
            level=settings.behavior_level,
            outside=settings.behavior_outside,
            cap=settings.behavior_cap,
        )
    return PolicyTargets(
        proximal_NR=proximal.logprobs_NR,
        advantages_NR=estimate.advantages_BR.float(),
        importance_NR=importance_NR,
        reference_NR=batch.reference_NR if settings.objective.kl_loss else None,
        shared_values=None if settings.separate_values else values,
    )


def learnt(
    batch: Experience,
    proximal: Proximal,
    shaped: rewards.Rewards,
    policy: PolicyTargets,
    settings: TrainConfig,
) -> Learnt:
    """Return what the trajectory log says of each token."""
    return Learnt(
        learner_logprobs_NR=proximal.logprobs_NR,
        rewards_NR=shaped.total_BR,
        kl_penalties_NR=shaped.penalties_BR,
        values_NR=proximal.values_NR if settings.needs.values else None,
        advantages_NR=policy.advantages_NR,
        mask_NR=batch.mask_NR,
    )


def batch_metrics(batch: Experience, proximal: Proximal, values: ValueTargets | None) -> Metrics:
    """Return statistics of the batch, and how far who sampled it is from who learns."""
    tokens, rows = float(batch.mask_NR.sum()), float(len(batch))
    apart = ppo.mismatch(proximal.logprobs_NR, batch.behavior_NR, batch.mask_NR)
    drift_NR = ((proximal.logprobs_NR - batch.behavior_NR) * batch.mask_NR).exp() - 1.0
    metrics: Metrics = {
        Logged.SCORE: mean(float(batch.scores_N.sum()), rows),
        Logged.SCORE_DEVIATION: mean(float(batch.scores_N.double().std(correction=0)), 1),
        Logged.RESPONSE_LENGTH: mean(tokens, rows),
        Logged.EOS_SHARE: mean(float(batch.ended_N.sum()), rows),
        Logged.ENTROPY: mean(float(proximal.entropy_NR.sum(dtype=torch.float64)), tokens),
        Logged.RATIO_DEVIATION: mean(float(drift_NR.abs().max()), 1),
        Logged.MISMATCH_KL: mean(apart.kl, tokens),
        Logged.MISMATCH_RATIO: mean(apart.ratio, 1),
    }
    compared = [scores for scores in _by_group(batch) if len(scores) > 1]
    if compared:
        equal = sum(min(scores) == max(scores) for scores in compared)
        metrics[Logged.EQUAL_GROUPS] = mean(equal, len(compared))
    of_source: defaultdict[str, list[float]] = defaultdict(list)
    for source, score in zip(batch.sources, batch.scores_N.tolist(), strict=True):
        if source is not None:
            of_source[source].append(score)
    for source, scores in of_source.items():
        # A slash groups metrics, and names of data sets have some.
        metrics[Logged.SOURCE_SCORE.of(source.replace("/", ":"))] = mean(sum(scores), len(scores))
    metrics |= component_means(batch.components)
    if values is not None:
        explained = gae.explained_variance(proximal.values_NR, values.returns_NR, batch.mask_NR)
        metrics[Logged.EXPLAINED_VARIANCE] = mean(explained, 1)
    return metrics


def _by_group(batch: Experience) -> list[list[float]]:
    """Return the scores of each prompt's responses."""
    groups: defaultdict[int, list[float]] = defaultdict(list)
    for group, score in zip(batch.groups_N.tolist(), batch.scores_N.tolist(), strict=True):
        groups[group].append(score)
    return list(groups.values())
