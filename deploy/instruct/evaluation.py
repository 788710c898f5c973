"""The evaluation of `instruct`: the model as it came and the trained policy before the judge.

Answers that are judged are greedy, as IFEval's own are where it is run (`lm-eval`, task `ifeval`:
``do_sample: false``); held-out topics are answered at the temperature of training too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from common.config.model import PretrainedConfig
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.files import write_atomic
from deploy.evaluation.answering import answers, apart
from deploy.evaluation.intervals import Interval, bootstrap_mean, wilson_interval
from deploy.evaluation.sampling import sample_both
from deploy.instruct import elsewhere, judge, reward
from deploy.instruct.instructions import KINDS
from deploy.instruct.outcome import Evaluation, Side, Verdict
from deploy.instruct.task import SPLITS, Ask, Split, Task, write_prompts
from deploy.run_folder.weights import final_policy, policy_start
from deploy.stages.encoding import read_encoded_prompts
from deploy.stages.session import Session
from deploy.workers.pool import Pool

LABEL = "eval"
"""Of the requests that all sides answer: from the same seeds."""
Judged = Sequence[Sequence[bool]]
"""Of each answer, whether each instruction of its prompt is followed."""


def evaluate(
    session: Session, config: RunConfig, task: Task, pools: tuple[Pool, Pool]
) -> Evaluation:
    """Judge the model as it came, taught and trained, and look elsewhere; writes samples.jsonl."""
    held_out = [(split, ask) for split in SPLITS for ask in task.held_out[split]]
    splits, asks = zip(*held_out, strict=True)
    topics = task.held_out["topics"]
    assert asks[: len(topics)] == tuple(topics)
    weights = _weights(config)
    session.end_gang()  # it holds a quarter of the memory that evaluation is about to need
    with session.stage("evaluate", "asked the judge"):
        prompts = encoded(session, config, "held-out", [ask.text for ask in asks])
        sampled, kl = _sampled(session, config, prompts[: len(topics)], weights, pools)
        greedy, capitals = _greedy(session, config, asks, prompts, weights)
        judged = {side: _judged(asks, of_side.texts) for side, of_side in greedy.items()}
        at_random = {side: _judged(topics, texts) for side, texts in sampled.items()}
        _write_samples(session, asks, greedy, judged)
    with session.stage("elsewhere", "looked at what it cost elsewhere"):
        texts = session.tokenizer().encode_batch(elsewhere.other_texts())
        pages = [ids[: elsewhere.TEXT_TOKENS] for ids in texts]
        text_nll = {
            side: apart(config.rollout, elsewhere.text_nll, path, pages)
            for side, path in weights.items()
        }
    kept = {side: _kept(splits, of_side) for side, of_side in judged.items()}
    return Evaluation(
        verdicts={
            side: Verdict(
                judge_accuracy=share(kept[side]["topics"]),
                judge_accuracy_kinds=share(kept[side]["kinds"]),
                judge_accuracy_combinations=share(kept[side]["combinations"]),
                judge_accuracy_sampled=share([all(v) for v in at_random[side]]),
                instruction_accuracy=share([v for vs in judged[side][: len(topics)] for v in vs]),
                score=fmean(greedy[side].scores),
                response_length=fmean(greedy[side].lengths[: len(topics)]),
                distinct=len({*greedy[side].texts}) / len(asks),
                text_nll=text_nll[side],
                capitals_known=share(elsewhere.known(capitals[side])),
            )
            for side in weights
        },
        follows={side: _by_kind(asks, judged[side]) for side in weights},
        judge_accuracy_rise=_rise(config, judged["before"], judged["after"], len(topics)),
        judge_accuracy_sampled_rise=_rise(
            config, at_random["before"], at_random["after"], len(topics)
        ),
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
    base = policy_start(config)
    old, new = sample_both(config, base, weights["after"], prompts, *pools, label=LABEL)
    for found in (old, new):
        assert found.prompts == list(range(len(prompts))), "the reward function gives nothing up"
    session.close()
    session.lock("quickstart")
    sampled: dict[Side, list[str]] = {"after": new.responses}
    if "taught" in weights:
        sampled["taught"] = old.responses
        came = apart(config.rollout, answers, config, weights["before"], prompts, label=LABEL)
        sampled["before"] = came.texts
    else:  # nothing was taught: the model as it came is the base of the trained one
        sampled["before"] = old.responses
    return sampled, fmean(new.kl)


def _greedy(
    session: Session,
    config: RunConfig,
    asks: Sequence[Ask],
    prompts: Sequence[EncodedPrompt],
    weights: Mapping[Side, Path],
) -> tuple[dict[Side, Answered], dict[Side, list[str]]]:
    """Return each side's greedy answers to held-out prompts, and to the questions for capitals."""
    asked = [*prompts, *encoded(session, config, "capitals", elsewhere.questions())]
    greedy: dict[Side, Answered] = {}
    capitals: dict[Side, list[str]] = {}
    for side, path in weights.items():
        said = apart(config.rollout, answers, config, path, asked, label="greedy", greedy=True)
        texts, capitals[side] = said.texts[: len(asks)], said.texts[len(asks) :]
        greedy[side] = Answered(
            texts=texts,
            lengths=said.lengths[: len(asks)],
            scores=reward.score([ask.text for ask in asks], texts),
        )
    return greedy, capitals


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One side's greedy answers to all held-out prompts, in their order."""

    texts: list[str]
    lengths: list[int]
    scores: list[float]


def _weights(config: RunConfig) -> dict[Side, Path]:
    """Return the weights of each side; there is no taught one without a supervised stage."""
    assert isinstance(config.model, PretrainedConfig)
    came, start = Path(config.model.start), policy_start(config)
    taught: dict[Side, Path] = {} if start.absolute() == came.absolute() else {"taught": start}
    return {"before": came, **taught, "after": final_policy(config)}


def encoded(
    session: Session, config: RunConfig, name: str, texts: Sequence[str]
) -> list[EncodedPrompt]:
    """Write prompts beside the run's others, and read them as every stage reads its own."""
    path = session.folder.data.path / f"{name}.jsonl"
    write_prompts(path, texts)
    prompts, _ = read_encoded_prompts([str(path)], session.tokenizer(), config)
    return prompts


def share(verdicts: Sequence[bool]) -> Interval:
    """Return a share with Wilson's interval."""
    low, high = wilson_interval(sum(verdicts), len(verdicts))
    return Interval(mean=sum(verdicts) / max(1, len(verdicts)), low=low, high=high)


def _judged(asks: Sequence[Ask], responses: Sequence[str]) -> Judged:
    return judge.verdicts([ask.instructions for ask in asks], responses)


def _kept(splits: Sequence[Split], judged: Judged) -> dict[Split, list[bool]]:
    """Tell of each prompt of each split whether all of its instructions are followed."""
    return {
        split: [all(v) for s, v in zip(splits, judged, strict=True) if s == split]
        for split in SPLITS
    }


def _rise(config: RunConfig, before: Judged, after: Judged, topics: int) -> Interval:
    """Return after less before, prompt by prompt, over the first prompts: held-out topics."""
    pairs = zip(before[:topics], after[:topics], strict=True)
    return bootstrap_mean([all(new) - all(old) for old, new in pairs], config.seed)


def _by_kind(asks: Sequence[Ask], judged: Judged) -> dict[str, Interval]:
    """Return the share of followed instructions of each kind that is asked for."""
    of_kind: defaultdict[str, list[bool]] = defaultdict(list)
    for ask, followed in zip(asks, judged, strict=True):
        for instruction, verdict in zip(ask.instructions, followed, strict=True):
            of_kind[instruction.kind].append(verdict)
    return {kind: share(of_kind[kind]) for kind in KINDS if kind in of_kind}


def _write_samples(
    session: Session,
    asks: Sequence[Ask],
    sampled: Mapping[Side, Answered],
    judged: Mapping[Side, Judged],
) -> None:
    rows = [
        {"prompt": ask.text}
        | {side: of_side.texts[i] for side, of_side in sampled.items()}
        | {f"score_{side}": of_side.scores[i] for side, of_side in sampled.items()}
        | {f"conforms_{side}": all(of_side[i]) for side, of_side in judged.items()}
        for i, ask in enumerate(asks)
    ]
    write_atomic(session.folder.samples, (json.dumps(row).encode() + b"\n" for row in rows))
