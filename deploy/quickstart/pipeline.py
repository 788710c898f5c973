"""The quickstart: from nothing to a policy that learned from preferences, in one command.

harvest -> tokenizer -> sft -> comparisons -> reward model -> policy (PPO + PPG) -> judges -> report
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Sequence
from typing import Any

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.data.records import Prompt, write_jsonl
from common.files import write_atomic
from deploy.evaluation.compare import (
    Sampled,
    best_of,
    compare,
    paired,
    policy_weights,
    sample,
    sample_both,
    sample_scored,
)
from deploy.evaluation.intervals import best_of_n_kl
from deploy.evaluation.report import write_report
from deploy.quickstart import task as quickstart_task
from deploy.quickstart.harvest import Pair, prompt_text
from deploy.quickstart.judges import conformance
from deploy.quickstart.task import Task, judge_lines
from deploy.run_folder.inputs import RunInputs
from deploy.screen import say
from deploy.stages import policy, preparation, supervised
from deploy.stages.session import Session
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool


def run_quickstart(session: Session) -> dict[str, Any]:
    """Run every stage; writes summary.json, samples.jsonl and report.html; returns the summary."""
    begin = time.perf_counter()
    session.lock("quickstart")
    config, console = session.config, session.console
    folder = session.folder.data
    with_data = quickstart_task.with_data(config, folder)
    begun = bool(RunInputs(session.run_dir).standing())
    with session.stage("harvest", "harvested signatures and docstrings of this environment"):
        task, facts = quickstart_task.prepare(config.quickstart, config.seed, folder, begun=begun)
    say(console, f"  {facts['pairs']} pairs, fingerprint {facts['fingerprint'][:12]}")
    config = with_data
    with session.stage("tokenizer", "trained a byte-level BPE tokenizer"):
        config = preparation.prepare_tokenizer(session, config)
    with session.stage("sft", "trained the supervised policy"):
        sft = supervised.run_sft(session, config)
    say(console, f"  held-out loss {sft['heldout_loss']:.3f} nats per token")
    rollout = session.keep(
        rollout_pool(config, config.name, session.folder.tokenizer, session.folder.sft.weights)
    )
    with session.stage("comparisons", "sampled and labelled comparisons"):
        count, ties = _make_comparisons(session, config, task, rollout)
    say(console, f"  {count} comparisons, {ties} ties left out")
    with session.stage("reward", "trained the reward model"):
        reward = supervised.run_reward(session, config)
    say(console, f"  held-out accuracy {reward['accuracy_heldout']:.1%}")
    scoring = session.keep(
        reward_pool(
            config,
            config.name,
            session.folder.tokenizer,
            session.folder.sft.weights,
            session.folder.reward_model.weights,
        )
    )
    with session.stage("train", "trained the policy"):
        trained = policy.run_train(session, config, (rollout, scoring))
    session.lock("quickstart")
    with session.stage("evaluate", "asked the judges"):
        found = evaluate_run(session, config, task, (rollout, scoring))
    summary: dict[str, Any] = {
        "reward_model_accuracy": reward["accuracy_heldout"],
        "sft_heldout_loss": sft["heldout_loss"],
        "comparisons": count,
        "comparison_ties": ties,
        **trained,
        **found,
        **{f"seconds_{name}": seconds for name, seconds in session.seconds.items()},
        "seconds_pipeline": time.perf_counter() - begin,
    }
    write_atomic(session.folder.summary, [json.dumps(summary, indent=1).encode()])
    write_report(session.run_dir)
    return summary


def evaluate_run(
    session: Session, config: RunConfig, task: Task, pools: tuple[Pool, Pool]
) -> dict[str, float]:
    """SFT against policy on held-out signatures; writes samples.jsonl."""
    asked, prompts = encoded_prompts(session, config, task.held_out[: config.evaluate.prompts])
    before, after = paired(
        *sample_both(
            config,
            session.folder.sft.weights,
            session.folder.policy.weights,
            prompts,
            *pools,
            label="eval",
        )
    )
    by_prompt = {prompt_text(pair): pair for pair in asked}
    found = compare(
        [p.text for p in prompts],
        before,
        after,
        lambda texts, lines: task.qualities([by_prompt[text] for text in texts], _lines(lines)),
    )
    named = {"sft": before, "policy": after}
    if config.evaluate.best_of:
        sft = policy_weights(config, session.folder.sft.weights, 0)
        many = sample_scored(
            config, sft, prompts, *pools, label="best", samples=config.evaluate.best_of
        )
        named["best_of_n"] = best_of(many)
        found["kl_best_of_n"] = best_of_n_kl(config.evaluate.best_of)
    for name, sampled in named.items():
        pairs, lines = [asked[i] for i in sampled.prompts], _lines(sampled.responses)
        verdict = judge_lines(pairs, lines, config.seed)
        found |= {f"{key}_{name}": value for key, value in verdict.items()}
        found[f"quality_{name}"] = sum(task.qualities(pairs, lines)) / len(lines)
    pairs = [asked[i] for i in before.prompts]
    found |= {
        f"{key}_human": value
        for key, value in judge_lines(pairs, [p.docstring for p in pairs], config.seed).items()
    }
    _write_samples(session, pairs, before, after)
    return found


def _make_comparisons(
    session: Session, config: RunConfig, task: Task, rollout: Pool
) -> tuple[int, int]:
    """Samples and people's lines, two for each signature, labelled; writes comparisons.jsonl."""
    settings, seed = config.quickstart, config.seed
    pairs, prompts = encoded_prompts(session, config, task.train[: settings.comparisons])
    kinds = quickstart_task.draw_sides(len(pairs), settings, seed)
    weights = policy_weights(config, session.folder.sft.weights, 0)

    def samples(label: str, wanted: Container[str]) -> dict[int, str]:
        """The lines sampled for pairs of some kinds, by the pair's number."""
        some = [number for number, kind in enumerate(kinds) if kind in wanted]
        asked = [prompts[number] for number in some]
        rows = sample(config, weights, asked, rollout, label=label) if some else []
        return dict(zip(some, _lines([row.response_text for row in rows]), strict=True))

    first = samples("first", ("sample-human", "sample-sample"))
    second = samples("second", ("sample-sample",))
    others = iter(quickstart_task.borrowed(task, len(pairs), seed))
    sides = []
    for number, (pair, kind) in enumerate(zip(pairs, kinds, strict=True)):
        if kind == "human-borrowed":
            sides.append((pair.docstring, next(others)))
        else:
            other = second[number] if kind == "sample-sample" else pair.docstring
            sides.append((first[number], other))
    made, ties = quickstart_task.comparisons(task, pairs, sides, settings, seed)
    write_jsonl(str(session.folder.data / "comparisons.jsonl"), made)
    return len(made), ties


def encoded_prompts(
    session: Session, config: RunConfig, pairs: Sequence[Pair]
) -> tuple[list[Pair], list[EncodedPrompt]]:
    """Pairs whose prompt fits the context, and their prompts in tokens."""
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


def _lines(responses: Sequence[str]) -> list[str]:
    return [response.strip() for response in responses]


def _write_samples(
    session: Session, pairs: Sequence[Pair], before: Sampled, after: Sampled
) -> None:
    old, new = _lines(before.responses), _lines(after.responses)
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
