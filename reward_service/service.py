"""The reward service's worker: rollouts in, scored trajectories out.

Consumes: tables of Rollout, several at once (the controller hands over whatever has been committed,
whichever actors it came from, so that batches form across actors).
Produces: one table of ScoredTrajectory and `ScoreFacts` for the controller.
Waits for: its own frozen passes, functions and remote endpoints, each with a deadline.

The score is the weighted sum of named components. A component that gives a response up (a remote
endpoint that stays down) dead-letters that one response: it is named in the facts, dropped and
counted, and the run goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from common.config.model import ModelConfig, PretrainedConfig
from common.config.rewards import (
    EndpointComponent,
    FunctionComponent,
    HttpComponent,
    JudgeComponent,
    ModelComponent,
    RewardComponent,
)
from common.config.workers import RewardServiceConfig
from common.data.tokenizer import load_tokenizer
from common.devices import Compute
from common.errors import RewardError
from common.logprobs import Sampling
from common.models.build import build_decoder
from common.models.networks import DecoderNetwork, compute_in
from common.models.weight_files import load_decoder
from common.native.frozen import run_natively
from common.out_of_memory import memory_for
from common.wire.trajectory import Rollout, ScoredTrajectory, extend, from_table, to_table
from reward_service.http_scorer import COUNTS, HttpScorer
from reward_service.http_settings import HttpScorerSettings
from reward_service.isolation import IsolatedScorer
from reward_service.judge import JudgeScorer
from reward_service.models import ReferencePolicy, RewardModel, frozen_pass
from reward_service.samples import Sample
from reward_service.scorers import FunctionScorer, Scorer, ScoreResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFacts:
    """What the controller needs to know of a scored batch."""

    rollout_ids: tuple[str, ...]
    """Scored, in the order of the table."""
    scores: tuple[float, ...]
    """Of these, as float32."""
    dead_letters: Mapping[str, str]
    """Given up: rollout_id -> why."""
    seconds: float
    http: Mapping[str, int] = field(default_factory=dict)
    """What remote components counted in this call, by the names of their metrics."""


class RewardWorker:
    """Reward model, reference policy and remote or local components of one worker."""

    @memory_for(
        "loading a reward worker's models",
        "place reward workers on nodes with more memory (reward_service.labels)",
    )
    def __init__(
        self,
        settings: RewardServiceConfig,
        model: ModelConfig,
        reference: str,
        reward_model: str | None,
        sampling: Sampling,
        compute: Compute,
        *,
        merge: bool,
        judge: PretrainedConfig | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Load the reference policy, and what the components score with.

        Args:
            settings: of the reward service.
            model: shape of reference policy and reward model.
            reference: weights of the supervised policy; `settings.reference` goes before it.
            reward_model: weights of the reward model; None where no component needs it.
            sampling: how rollouts were sampled.
            compute: threads and device of the frozen passes.
            merge: run frozen passes over all tables together, which is faster; without it each
                table is a batch of its own, so that results do not depend on which leases arrived
                together.
            judge: the reward model's own checkpoint, where it is not of the policy's shape.
            precision: of the products in frozen passes.
        """
        compute.apply()
        self.settings = settings
        self.merge = merge
        self.reference = self._reference(model, reference, sampling)
        self.scorers: dict[str, Scorer] = {}
        self.reward_model: RewardModel | None = None
        for name, component in settings.components.items():
            if isinstance(component, ModelComponent):
                if reward_model is None:
                    raise ValueError(f"component '{name}' needs a trained reward model")
                self.reward_model = self._reward_model(model, reference, reward_model, judge)
            else:
                self.scorers[name] = SCORERS[type(component)](component)
        self._prepare(compute.device, precision)

    def _reference(self, model: ModelConfig, weights: str, sampling: Sampling) -> ReferencePolicy:
        """Load the reference; one of its own reads as long sequences as the policy writes."""
        own = self.settings.reference
        if own is None:
            return ReferencePolicy(model, Path(weights), sampling)
        context = max(own.context, model.context)
        shape = own.model_copy(update={"vocab_size": model.vocab_size, "context": context})
        return ReferencePolicy(shape, Path(own.start), sampling)

    def _prepare(self, device: str, precision: Literal["fp32", "bf16"]) -> None:
        """Let both models compute where and as settings say.

        After both are there: an adapter is put on the base as it was trained.
        """
        networks: list[DecoderNetwork] = [self.reference.network]
        if self.reward_model is not None:
            networks.append(self.reward_model.network)
        if precision == "bf16":
            for network in networks:
                compute_in(network, torch.bfloat16)
        for network in networks:
            network.to(device)
            run_natively(network, self.settings.kernels)

    def _reward_model(
        self, model: ModelConfig, policy: str, weights: str, judge: PretrainedConfig | None
    ) -> RewardModel:
        """Load the reward model; the base of an adapter is what its training began with."""
        base = self.reference.network.decoder
        if judge is not None or self.settings.reference is not None:
            base = build_decoder(judge or model)
            if not Path(weights).is_dir():
                load_decoder(base, Path(judge.start if judge else policy))
        tokenizer = load_tokenizer(judge.start) if judge else None
        return RewardModel(judge or model, Path(weights), base, tokenizer)

    def score(self, *tables: pa.Table) -> tuple[ScoreFacts, pa.Table]:
        """Score and add ref_logprobs to every rollout of the tables, in their order."""
        return self._score(tables, self.settings.scoring)

    def score_held_out(self, *tables: pa.Table) -> tuple[ScoreFacts, pa.Table]:
        """As `score`, and ask what is `evaluation_only` too."""
        return self._score(tables, self.settings.components)

    def _score(
        self, tables: Sequence[pa.Table], asked: Mapping[str, RewardComponent]
    ) -> tuple[ScoreFacts, pa.Table]:
        begin, counted = time.perf_counter(), self._counted()
        batches = [from_table(table, Rollout) for table in tables]
        rollouts = [rollout for batch in batches for rollout in batch]
        model_scores: list[float] = []
        ref_logprobs: list[list[float]] = []
        for batch in [rollouts] if self.merge else batches:
            budget = self.settings.micro_batch_tokens
            with memory_for(
                f"a frozen pass of up to {budget} tokens",
                "lower reward_service.micro_batch_tokens",
            ):
                scores, logprobs = frozen_pass(batch, budget, self.reward_model, self.reference)
            model_scores += scores
            ref_logprobs += logprobs
        found, dead = self._components(rollouts, model_scores, asked)
        scored = [
            extend(
                rollout,
                ScoredTrajectory,
                score=found[i].score,
                score_components=found[i].components,
                token_scores=found[i].tokens,
                score_reason=found[i].reason or None,
                ref_logprobs=ref_logprobs[i],
                reward_version=0,
            )
            for i, rollout in enumerate(rollouts)
            if rollout.rollout_id not in dead
        ]
        table = to_table(scored, ScoredTrajectory)
        facts = ScoreFacts(
            rollout_ids=tuple(t.rollout_id for t in scored),
            scores=tuple(table["score"].to_pylist()),
            dead_letters=dead,
            seconds=time.perf_counter() - begin,
            http={name: count - counted[name] for name, count in self._counted().items()},
        )
        return facts, table

    def _counted(self) -> dict[str, int]:
        """Return what remote components have counted over this worker's life."""
        counts: dict[str, int] = {}
        for name, scorer in self.scorers.items():
            if isinstance(scorer, HttpScorer | JudgeScorer):
                stats = scorer.stats()
                counts |= {logged.of(name): stats.get(count, 0) for count, logged in COUNTS.items()}
        return counts

    def _components(
        self,
        rollouts: Sequence[Rollout],
        model_scores: Sequence[float],
        asked: Mapping[str, RewardComponent],
    ) -> tuple[list[_Found], dict[str, str]]:
        """Return what the components say of each rollout, and the dead letters.

        Raises:
            RewardError: a value is not finite as a float32, which it is sent as.
        """
        found = [_Found() for _ in rollouts]
        dead: dict[str, str] = {}
        samples = [_sample(rollout) for rollout in rollouts]
        for name, component in asked.items():
            weight = component.weight if name in self.settings.scoring else None
            if weight is None:
                self._tell(name, rollouts, found)
                continue
            if isinstance(component, ModelComponent):
                results = [
                    ScoreResult(rollout_id=rollout.rollout_id, score=score)
                    for rollout, score in zip(rollouts, model_scores, strict=True)
                ]
            else:
                results = self.scorers[name].score(samples)
            for whole, result in zip(found, results, strict=True):
                if result.score is None:
                    dead[result.rollout_id] = f"{name}: {result.error}"
                else:
                    whole.add(name, weight, result)
        return found, dead

    def _tell(self, name: str, rollouts: Sequence[Rollout], found: Sequence[_Found]) -> None:
        """Add what only evaluates, of the responses that are sampled.

        It gives none up: where it has no answer it has no value.
        """
        of = [i for i, rollout in enumerate(rollouts) if not rollout.greedy]
        samples = [_sample(rollouts[i]) for i in of]
        results = self.scorers[name].score(samples) if samples else []
        for i, result in zip(of, results, strict=True):
            if result.score is not None:
                found[i].add(name, None, result)


@dataclass(slots=True)
class _Found:
    """What the components have said of one rollout so far."""

    score: float = 0.0
    """The weighted sum."""
    components: dict[str, float] = field(default_factory=dict)
    """Unweighted."""
    tokens: list[float] | None = None
    """Weighted rewards on tokens, a part of the score."""
    reason: str = ""

    def add(self, name: str, weight: float | None, result: ScoreResult) -> None:
        """Add a component's; without a weight it is no part of the score.

        Raises:
            RewardError: a value is not finite as a float32, which it is sent as.
        """
        assert result.score is not None
        self.components[name] = _finite(name, result.rollout_id, result.score)
        self.score += (weight or 0.0) * result.score
        for part, value in result.parts.items():
            self.components[f"{name}/{part}"] = _finite(name, result.rollout_id, value)
        if result.tokens is not None and weight is not None:
            before = self.tokens or [0.0] * len(result.tokens)
            self.tokens = [
                was + weight * _finite(name, result.rollout_id, value)
                for was, value in zip(before, result.tokens, strict=True)
            ]
        if result.reason:
            self.reason += f"{' · ' if self.reason else ''}{name}: {result.reason}"


def _sample(rollout: Rollout) -> Sample:
    """Return what scorers are told of a rollout."""
    chat = json.loads(rollout.conversation)["messages"] if rollout.conversation else ()
    return Sample(
        prompt=rollout.prompt_text,
        response=rollout.response_text,
        columns=json.loads(rollout.columns) if rollout.columns else {},
        source=rollout.source or "",
        messages=tuple(chat),
        finished=rollout.finish_reason != "length",
        tokens=tuple(rollout.response_ids),
        group=rollout.group,
        rollout_id=rollout.rollout_id,
    )


def _finite(name: str, rollout_id: str, value: float) -> float:
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise RewardError(
            f"component '{name}' scored rollout {rollout_id} as {value}; "
            "a score is a finite float32"
        )
    return value


def _function_scorer(component: FunctionComponent) -> Scorer:
    apart = component.isolation
    if apart is None:
        return FunctionScorer(component.target)
    return IsolatedScorer(
        component.target,
        timeout_s=apart.timeout_s,
        memory_mb=apart.memory_mb,
        processes=apart.processes,
        failed_score=apart.failed_score,
    )


def _http_scorer(component: HttpComponent) -> HttpScorer:
    settings = _endpoint(component, component.target, component.batch_size)
    return HttpScorer(settings, seed=os.getpid())


def _judge_scorer(component: JudgeComponent) -> JudgeScorer:
    url = f"{component.target.rstrip('/')}/chat/completions"
    return JudgeScorer(component, _endpoint(component, url, 1), seed=os.getpid())


def _endpoint(component: EndpointComponent, url: str, batch_size: int) -> HttpScorerSettings:
    """Return how to talk to a component's endpoint.

    Replicas differ in their jitter, by their process: with the same they would come back as a herd.
    """
    return HttpScorerSettings(
        url=url,
        batch_size=batch_size,
        max_concurrency=component.max_concurrency,
        timeout_s=component.timeout_s,
        token_env=component.token_env or None,
        max_retries=component.max_retries,
        give_up_after_s=component.give_up_after_s,
        dead_letter_path=Path(component.dead_letters) if component.dead_letters else None,
    )


SCORERS: dict[type[RewardComponent], Callable[[Any], Scorer]] = {
    FunctionComponent: _function_scorer,
    HttpComponent: _http_scorer,
    JudgeComponent: _judge_scorer,
}
"""What scores a component, by its kind; the reward model is run with the reference policy."""
