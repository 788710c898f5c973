"""The quickstart: from nothing to a policy that learned from preferences, in one command.

harvest -> tokenizer -> sft -> comparisons -> reward model -> policy (PPO + PPG) -> judges -> report
"""

from __future__ import annotations

import json
import time
from collections.abc import Container

from common.config.run import RunConfig
from common.data.records import write_jsonl
from common.files import write_atomic
from deploy.evaluation.report import write_report
from deploy.evaluation.sampling import policy_weights, sample
from deploy.quickstart import task as quickstart_task
from deploy.quickstart.evaluation import encoded_prompts, evaluate, stripped
from deploy.quickstart.outcome import IN_REPORT, Outcome
from deploy.quickstart.task import Task
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.weights import policy_start, reward_weights
from deploy.screen import say
from deploy.stages import policy, preparation, supervised
from deploy.stages.session import Session
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool


def run_quickstart(session: Session) -> Outcome:
    """Run every stage; writes summary.json, samples.jsonl and report.html."""
    begin = time.perf_counter()
    session.lock("quickstart")
    config, console = session.config, session.console
    settings = quickstart_task.settings_of(config)
    folder = session.folder.data
    with_data = quickstart_task.with_data(config, folder)
    begun = bool(RunInputs(session.run_dir).standing())
    with session.stage("harvest", "harvested signatures and docstrings of this environment"):
        task, facts = quickstart_task.prepare(settings, config.seed, folder, begun=begun)
    say(console, f"  {facts['pairs']} pairs, fingerprint {facts['fingerprint'][:12]}")
    config = with_data
    with session.stage("tokenizer", "trained a byte-level BPE tokenizer"):
        config = preparation.prepare_tokenizer(session, config)
    with session.stage("sft", "trained the supervised policy"):
        sft = supervised.once(session, config, "sft")
    say(console, f"  held-out loss {sft['heldout_loss']:.3f} nats per token")
    rollout = session.keep(
        rollout_pool(config, config.name, session.folder.tokenizer, policy_start(config))
    )
    with session.stage("comparisons", "sampled and labelled comparisons"):
        count, ties = _make_comparisons(session, config, task, rollout)
    say(console, f"  {count} comparisons, {ties} ties left out")
    with session.stage("reward", "trained the reward model"):
        reward = supervised.once(session, config, "reward")
    say(console, f"  held-out accuracy {reward['accuracy_heldout']:.1%}")
    scoring = session.keep(
        reward_pool(
            config,
            config.name,
            session.folder.tokenizer,
            policy_start(config),
            reward_weights(config),
        )
    )
    with session.stage("train", "trained the policy"):
        resumption = policy.resumption_of(config)
        policy.tell(console, config, resumption)
        trained = resumption.facts or policy.run_train(session, config, (rollout, scoring))
    session.lock("quickstart")
    with session.stage("evaluate", "asked the judges"):
        evaluation = evaluate(session, config, task, (rollout, scoring))
    outcome = Outcome(
        reward_model_accuracy=reward["accuracy_heldout"],
        sft_heldout_loss=sft["heldout_loss"],
        comparisons=count,
        comparison_ties=ties,
        trained=trained,
        evaluation=evaluation,
        seconds={**session.seconds, "pipeline": time.perf_counter() - begin},
    )
    summary = json.dumps(outcome.figures(), indent=1).encode()
    write_atomic(session.folder.summary, [summary])
    write_report(session.run_dir, IN_REPORT, config)
    return outcome


def _make_comparisons(
    session: Session, config: RunConfig, task: Task, rollout: Pool
) -> tuple[int, int]:
    """Have pairs of lines labelled; writes comparisons.jsonl, returns its rows and the ties."""
    settings, seed = quickstart_task.settings_of(config), config.seed
    pairs, prompts = encoded_prompts(session, config, task.train[: settings.comparisons])
    kinds = quickstart_task.draw_kinds(len(pairs), settings, seed)
    weights = policy_weights(config, policy_start(config), 0)

    def samples(label: str, wanted: Container[str]) -> dict[int, str]:
        """Sample lines for the pairs of some kinds, by the pair's number."""
        some = [number for number, kind in enumerate(kinds) if kind in wanted]
        asked = [prompts[number] for number in some]
        rows = sample(config, weights, asked, rollout, label=label) if some else []
        return dict(zip(some, stripped([row.response_text for row in rows]), strict=True))

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
    labelled, ties = quickstart_task.comparisons(task, pairs, sides, settings, seed)
    write_jsonl(str(session.folder.data.comparisons), labelled)
    return len(labelled), ties
