"""The evaluation of `instruct`: the model as it came and the trained policy before the judge."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from actors.generation.decoder_generator import build_engine
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.devices import compute_of, torch_dtype
from common.files import write_atomic
from common.models.build import build_decoder
from common.models.weight_files import load_decoder
from deploy.evaluation.compare import paired
from deploy.evaluation.intervals import Interval, bootstrap_mean, wilson_interval
from deploy.evaluation.sampling import Sampled, sample_both
from deploy.instruct import elsewhere, judge
from deploy.instruct.instructions import KINDS
from deploy.instruct.outcome import Evaluation, Side, Verdict
from deploy.instruct.task import SPLITS, Ask, Split, Task, write_prompts
from deploy.run_folder.weights import final_policy, policy_start
from deploy.stages.encoding import read_encoded_prompts
from deploy.stages.session import Session
from deploy.workers.pool import Pool

Judged = Sequence[Sequence[bool]]
"""Of each answer, whether each instruction of its prompt is followed."""


def evaluate(
    session: Session, config: RunConfig, task: Task, pools: tuple[Pool, Pool]
) -> Evaluation:
    """Judge both sides on the held-out prompts, and elsewhere; writes samples.jsonl."""
    held_out = [(split, ask) for split in SPLITS for ask in task.held_out[split]]
    weights: dict[Side, Path] = {"before": policy_start(config), "after": final_policy(config)}
    with session.stage("evaluate", "asked the judge"):
        prompts = encoded(session, config, "held-out", [ask.text for _, ask in held_out])
        base, policy = weights["before"], weights["after"]
        old, new = paired(*sample_both(config, base, policy, prompts, *pools, label="eval"))
        sampled: dict[Side, Sampled] = {"before": old, "after": new}
        splits, asks = zip(*(held_out[i] for i in old.prompts), strict=True)
        judged = {side: _judged(asks, of_side.responses) for side, of_side in sampled.items()}
        _write_samples(session, asks, sampled, judged)
    session.close()  # workers hold memory that this process is about to need
    session.lock("quickstart")
    with session.stage("elsewhere", "looked at what it cost elsewhere"):
        topics, capitals = task.held_out["topics"], elsewhere.questions()
        asked = [*prompts[: len(topics)], *encoded(session, config, "capitals", capitals)]
        greedy = {side: _greedy(session, config, path, asked) for side, path in weights.items()}
        texts = session.tokenizer().encode_batch(elsewhere.other_texts())
        pages = [ids[: elsewhere.TEXT_TOKENS] for ids in texts]
        text_nll = {side: elsewhere.text_nll(path, pages) for side, path in weights.items()}
    kept = {side: _kept(splits, of_side) for side, of_side in judged.items()}
    differences = [b - a for a, b in zip(*(kept[side]["topics"] for side in weights), strict=True)]
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
                distinct=len({*sampled[side].responses}) / len(asks),
                text_nll=text_nll[side],
                capitals_known=share(elsewhere.known(greedy[side][len(topics) :])),
            )
            for side in weights
        },
        follows={side: _by_kind(asks, judged[side]) for side in weights},
        judge_accuracy_rise=bootstrap_mean(differences, config.seed),
        kl=fmean(new.kl),
    )


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


def _greedy(
    session: Session, config: RunConfig, weights: Path, prompts: Sequence[EncodedPrompt]
) -> list[str]:
    """Answer with the most probable tokens, in this process."""
    rollout = config.rollout.model_copy(update={"temperature": 0.0})
    compute_of(cpus=rollout.cpus_per_actor, threads=rollout.threads).apply()
    decoder = build_decoder(config.model)
    load_decoder(decoder, weights)
    decoder = decoder.eval().requires_grad_(False).to(torch_dtype(rollout.precision))
    engine = build_engine(decoder, session.tokenizer(), rollout)
    requests = evaluation_requests(prompts, seed=config.seed, label="greedy")
    return [engine.text(response) for response in engine.generate(requests)]


def _write_samples(
    session: Session,
    asks: Sequence[Ask],
    sampled: Mapping[Side, Sampled],
    judged: Mapping[Side, Judged],
) -> None:
    rows = [
        {"prompt": ask.text}
        | {side: of_side.responses[i] for side, of_side in sampled.items()}
        | {f"score_{side}": of_side.scores[i] for side, of_side in sampled.items()}
        | {f"conforms_{side}": all(of_side[i]) for side, of_side in judged.items()}
        for i, ask in enumerate(asks)
    ]
    write_atomic(session.folder.samples, (json.dumps(row).encode() + b"\n" for row in rows))
