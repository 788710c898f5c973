"""The evaluation of `instruct`: the model as it came and the trained policy before the judge."""

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
from deploy.evaluation.intervals import Interval, bootstrap_mean, wilson_interval
from deploy.evaluation.sampling import Sampled, sample_both
from deploy.instruct import elsewhere, judge, reward
from deploy.instruct.answering import answers, apart
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
    weights = _weights(config)
    with session.stage("evaluate", "asked the judge"):
        prompts = encoded(session, config, "held-out", [ask.text for ask in asks])
        # Where nothing was taught, the model as it came is the base of the trained one.
        base, policy = policy_start(config), weights["after"]
        old, new = sample_both(config, base, policy, prompts, *pools, label=LABEL)
        session.close()  # workers hold memory that this process is about to need
        session.lock("quickstart")
        sampled: dict[Side, Answered] = {"after": _answered(new, len(asks))}
        if "taught" in weights:
            sampled["taught"] = _answered(old, len(asks))
            came = apart(config.rollout, answers, config, weights["before"], prompts, label=LABEL)
            scores = reward.score([ask.text for ask in asks], came.texts)
            sampled["before"] = Answered(texts=came.texts, lengths=came.lengths, scores=scores)
        else:
            sampled["before"] = _answered(old, len(asks))
        judged = {side: _judged(asks, sampled[side].texts) for side in weights}
        _write_samples(session, asks, sampled, judged)
    with session.stage("elsewhere", "looked at what it cost elsewhere"):
        topics = task.held_out["topics"]
        greedy, text_nll = _elsewhere(session, config, prompts[: len(topics)], weights)
    kept = {side: _kept(splits, of_side) for side, of_side in judged.items()}
    rise = zip(kept["before"]["topics"], kept["after"]["topics"], strict=True)
    return Evaluation(
        verdicts={
            side: Verdict(
                judge_accuracy=share(kept[side]["topics"]),
                judge_accuracy_kinds=share(kept[side]["kinds"]),
                judge_accuracy_combinations=share(kept[side]["combinations"]),
                judge_accuracy_greedy=share(
                    [all(v) for v in _judged(topics, greedy[side][: len(topics)])]
                ),
                instruction_accuracy=_of_instructions(splits, judged[side]),
                score=fmean(sampled[side].scores),
                response_length=fmean(sampled[side].lengths),
                distinct=len({*sampled[side].texts}) / len(asks),
                text_nll=text_nll[side],
                capitals_known=share(elsewhere.known(greedy[side][len(topics) :])),
            )
            for side in weights
        },
        follows={side: _by_kind(asks, judged[side]) for side in weights},
        judge_accuracy_rise=bootstrap_mean([b - a for a, b in rise], config.seed),
        kl=fmean(new.kl),
    )


def _elsewhere(
    session: Session,
    config: RunConfig,
    topics: Sequence[EncodedPrompt],
    weights: Mapping[Side, Path],
) -> tuple[dict[Side, list[str]], dict[Side, float]]:
    """Return each side's greedy answers, to topics and then to capitals, and its NLL of texts."""
    asked = [*topics, *encoded(session, config, "capitals", elsewhere.questions())]
    texts = session.tokenizer().encode_batch(elsewhere.other_texts())
    pages = [ids[: elsewhere.TEXT_TOKENS] for ids in texts]
    greedy: dict[Side, list[str]] = {}
    text_nll: dict[Side, float] = {}
    for side, path in weights.items():
        said = apart(config.rollout, answers, config, path, asked, label="greedy", greedy=True)
        greedy[side] = said.texts
        text_nll[side] = apart(config.rollout, elsewhere.text_nll, path, pages)
    return greedy, text_nll


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One side's answers to all held-out prompts."""

    texts: list[str]
    lengths: list[int]
    scores: list[float]


def _weights(config: RunConfig) -> dict[Side, Path]:
    """Return the weights of each side; there is no taught one without a supervised stage."""
    assert isinstance(config.model, PretrainedConfig)
    came, start = Path(config.model.start), policy_start(config)
    taught: dict[Side, Path] = {} if start.absolute() == came.absolute() else {"taught": start}
    return {"before": came, **taught, "after": final_policy(config)}


def _answered(sampled: Sampled, count: int) -> Answered:
    assert sampled.prompts == list(range(count)), "the reward function gives nothing up"
    return Answered(texts=sampled.responses, lengths=sampled.lengths, scores=sampled.scores)


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


def _of_instructions(splits: Sequence[Split], judged: Judged) -> Interval:
    """Return the share of single instructions that are followed on held-out topics."""
    each = [v for s, vs in zip(splits, judged, strict=True) if s == "topics" for v in vs]
    return share(each)


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
