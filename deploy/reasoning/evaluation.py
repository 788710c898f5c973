"""The evaluation of `reasoning`: all sides answer held-out questions, and the library verifies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from common.config.model import PretrainedConfig
from common.config.rewards import IsolationConfig
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, encode_prompts
from common.data.records import Prompt
from common.files import write_atomic
from deploy.evaluation.answering import Answers, answers, apart
from deploy.evaluation.intervals import Interval, bootstrap_mean, wilson_interval
from deploy.evaluation.sampling import Sampled, sample_both
from deploy.reasoning.outcome import Evaluation, Found, Side
from deploy.reasoning.task import HeldOut
from deploy.run_folder.weights import final_policy, policy_start
from deploy.stages.session import Session
from deploy.workers.pool import Pool
from reward_service.isolation import IsolatedScorer
from reward_service.samples import Sample

LABEL = "eval"
"""Of the requests that all sides answer: from the same seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the library says of an answer."""

    answered: bool
    score: float

    @property
    def right(self) -> bool:
        """Whether it is wholly right."""
        return self.score == 1.0


def evaluate(
    session: Session, config: RunConfig, held_out: Sequence[HeldOut], pools: tuple[Pool, Pool]
) -> Evaluation:
    """Verify the answers of the model as it came, taught and trained; writes samples.jsonl."""
    prompts = [prompt for part in held_out for prompt in part.prompts]
    families = [part.family for part in held_out for _ in part.prompts]
    encoded, _ = encode_prompts(
        prompts, session.tokenizer(), max_tokens=config.max_prompt_tokens, too_long="error"
    )
    weights = _weights(config)
    session.end_gang()  # it holds memory that evaluation is about to need
    with session.stage("evaluate", "verified answers to held-out questions"):
        sampled, kl = _sampled(session, config, encoded, weights, pools)
        greedy = {
            side: apart(config.rollout, answers, config, path, encoded, label="greedy", greedy=True)
            for side, path in weights.items()
        }
        if "before" not in weights:  # nothing was taught: both are the model as it came
            sampled["before"], greedy["before"] = sampled["came"], greedy["came"]
        with closing(verifier()) as verifying:
            judged = {s: verdicts(verifying, prompts, of.texts) for s, of in greedy.items()}
            at_random = {s: verdicts(verifying, prompts, of) for s, of in sampled.items()}
        _write_samples(session, prompts, greedy, judged)
    of = {part.family: [i for i, f in enumerate(families) if f == part.family] for part in held_out}
    found = {
        side: {
            family: _found(
                [judged[side][i] for i in rows],
                [at_random[side][i] for i in rows],
                [greedy[side].lengths[i] for i in rows],
            )
            for family, rows in of.items()
        }
        for side in greedy
    }
    return Evaluation(
        found=found,
        rise={
            family: _rise(judged["before"], judged["after"], rows, config.seed)
            for family, rows in of.items()
        },
        rise_sampled={
            family: _rise(at_random["before"], at_random["after"], rows, config.seed)
            for family, rows in of.items()
        },
        questions={part.family: len(part.prompts) for part in held_out},
        overlapping={part.family: part.overlapping for part in held_out},
        kl=kl,
    )


def _sampled(
    session: Session,
    config: RunConfig,
    prompts: Sequence[EncodedPrompt],
    weights: Mapping[Side, Path],
    pools: tuple[Pool, Pool],
) -> tuple[dict[Side, list[str]], float]:
    """Return each side's answers at the temperature of training, and the policy's KL.

    The workers are closed then: they hold memory that the rest of the evaluation is about to need.
    """
    old, new = sample_both(
        config, policy_start(config), weights["after"], prompts, *pools, label=LABEL
    )
    session.close()
    session.lock("quickstart")
    count = len(prompts)
    sampled: dict[Side, list[str]] = {"after": _of_all(new, count)}
    if "before" in weights:
        sampled["before"] = _of_all(old, count)
        came = apart(config.rollout, answers, config, weights["came"], prompts, label=LABEL)
        sampled["came"] = came.texts
    else:  # nothing was taught: policy training began with the model as it came
        sampled["came"] = _of_all(old, count)
    return sampled, fmean(new.kl)


def _weights(config: RunConfig) -> dict[Side, Path]:
    """Return the weights of each side; there is no taught one without a supervised stage."""
    assert isinstance(config.model, PretrainedConfig)
    came, start = Path(config.model.start), policy_start(config)
    taught: dict[Side, Path] = {} if start.absolute() == came.absolute() else {"before": start}
    return {"came": came, **taught, "after": final_policy(config)}


def _of_all(found: Sampled, prompts: int) -> list[str]:
    """Return a response to each prompt; what could not be verified in time is none."""
    said = dict(zip(found.prompts, found.responses, strict=True))
    return [said.get(prompt, "") for prompt in range(prompts)]


def verifier() -> IsolatedScorer:
    """Return the library's verifier, in a process of its own: it may run what a policy wrote."""
    limits = IsolationConfig()
    return IsolatedScorer(
        "reward_service.reasoning:score",
        timeout_s=limits.timeout_s,
        memory_mb=limits.memory_mb,
        processes=limits.processes,
        failed_score=0.0,
    )


def verdicts(
    verifying: IsolatedScorer, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[Verdict]:
    """Verify a response to each prompt."""
    samples = [
        Sample(prompt=prompt.prompt, response=response, columns=prompt.columns)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return [
        Verdict(answered=bool(found.parts.get("form")), score=found.score or 0.0)
        for found in verifying.score(samples)
    ]


def _found(
    judged: Sequence[Verdict], at_random: Sequence[Verdict], lengths: Sequence[int]
) -> Found:
    return Found(
        accuracy=_share(judged),
        sampled=_share(at_random),
        form=fmean(verdict.answered for verdict in judged),
        response_length=fmean(lengths),
    )


def _share(verdicts: Sequence[Verdict]) -> Interval:
    right = sum(verdict.right for verdict in verdicts)
    low, high = wilson_interval(right, len(verdicts))
    return Interval(mean=right / len(verdicts), low=low, high=high)


def _rise(
    before: Sequence[Verdict], after: Sequence[Verdict], rows: Sequence[int], seed: int
) -> Interval:
    """Return after less before, question by question."""
    return bootstrap_mean([after[i].right - before[i].right for i in rows], seed)


def _write_samples(
    session: Session,
    prompts: Sequence[Prompt],
    said: Mapping[Side, Answers],
    judged: Mapping[Side, Sequence[Verdict]],
) -> None:
    rows = [
        {"prompt": prompt.prompt}
        | {side: of_side.texts[i] for side, of_side in said.items()}
        | {f"score_{side}": of_side[i].score for side, of_side in judged.items()}
        | {f"conforms_{side}": of_side[i].right for side, of_side in judged.items()}
        for i, prompt in enumerate(prompts)
    ]
    write_atomic(session.folder.samples, (json.dumps(row).encode() + b"\n" for row in rows))
