"""The quickstart's evaluation: both policies and people's lines before the judges."""

from __future__ import annotations

import json
from collections.abc import Sequence

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.data.records import Prompt
from common.files import write_atomic
from deploy.evaluation.compare import compare, paired
from deploy.evaluation.intervals import best_of_n_kl
from deploy.evaluation.sampling import (
    Sampled,
    best_of,
    policy_weights,
    sample_both,
    sample_scored,
)
from deploy.quickstart.harvest import Pair, prompt_text
from deploy.quickstart.judges import conformance
from deploy.quickstart.outcome import Evaluation, Side, Verdict
from deploy.quickstart.task import Task, judge_lines
from deploy.run_folder.weights import final_policy, policy_start
from deploy.stages.session import Session
from deploy.workers.pool import Pool


def evaluate(
    session: Session, config: RunConfig, task: Task, pools: tuple[Pool, Pool]
) -> Evaluation:
    """Judge supervised and trained policy on held-out signatures; writes samples.jsonl."""
    pairs, prompts = encoded_prompts(session, config, task.held_out[: config.evaluate.prompts])
    policies = policy_start(config), final_policy(config)
    before, after = paired(*sample_both(config, *policies, prompts, *pools, label="eval"))
    by_prompt = {prompt_text(pair): pair for pair in pairs}

    def labeler(texts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return task.qualities([by_prompt[text] for text in texts], stripped(responses))

    sampled: dict[Side, Sampled] = {"sft": before, "policy": after}
    if config.evaluate.best_of:
        sft = policy_weights(config, policies[0], 0)
        many = sample_scored(
            config, sft, prompts, *pools, label="best", samples=config.evaluate.best_of
        )
        sampled["best_of_n"] = best_of(many)
    verdicts: dict[Side, Verdict] = {}
    for side, of_side in sampled.items():
        asked = [pairs[i] for i in of_side.prompts]
        lines = stripped(of_side.responses)
        verdicts[side] = judge_lines(asked, lines, config.seed, task.qualities(asked, lines))
    asked = [pairs[i] for i in before.prompts]
    verdicts["human"] = judge_lines(asked, [pair.docstring for pair in asked], config.seed)
    _write_samples(session, asked, before, after)
    return Evaluation(
        comparison=compare([prompt.text for prompt in prompts], before, after, labeler),
        verdicts=verdicts,
        kl_best_of_n=best_of_n_kl(config.evaluate.best_of) if config.evaluate.best_of else None,
    )


def encoded_prompts(
    session: Session, config: RunConfig, pairs: Sequence[Pair]
) -> tuple[list[Pair], list[EncodedPrompt]]:
    """Keep the pairs whose prompt fits the context; return them and their prompts in tokens."""
    tokenizer = session.tokenizer()
    kept: list[Pair] = []
    prompts: list[EncodedPrompt] = []
    for pair in pairs:
        prompt = Prompt(uid="", prompt=prompt_text(pair))
        ids = tokenizer.encode(prompt.prompt)
        if len(ids) <= config.max_prompt_tokens:
            kept.append(pair)
            prompts.append(EncodedPrompt(uid=prompt.uid, text=prompt.prompt, ids=ids))
    return kept, prompts


def stripped(responses: Sequence[str]) -> list[str]:
    """Return responses as docstring lines, without the blanks around them."""
    return [response.strip() for response in responses]


def _write_samples(
    session: Session, pairs: Sequence[Pair], before: Sampled, after: Sampled
) -> None:
    old, new = stripped(before.responses), stripped(after.responses)
    conforms = conformance(old + new, [*pairs, *pairs])
    rows = [
        {
            "prompt": pair.signature,
            "human": pair.docstring,
            "before": old[i],
            "after": new[i],
            "score_before": before.scores[i],
            "score_after": after.scores[i],
            "conforms_before": conforms[i],
            "conforms_after": conforms[len(pairs) + i],
        }
        for i, pair in enumerate(pairs)
    ]
    lines = (json.dumps(row).encode() + b"\n" for row in rows)
    write_atomic(session.folder.samples, lines)
