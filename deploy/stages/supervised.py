"""The supervised stages: the supervised policy, and the reward model."""

from __future__ import annotations

import shutil
from typing import Literal

from common.config.run import RunConfig
from common.data.records import read_comparisons, read_demonstrations
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.metric_catalogue import Logged
from deploy.exchange.card import add_card
from deploy.run_folder.weights import reward_start
from deploy.screen import say
from deploy.stages.encoding import (
    Divided,
    divided,
    encode_comparisons,
    encode_pairs,
    hold_out,
    same_pair,
)
from deploy.stages.preparation import (
    check_inputs,
    log_metrics,
    record_end,
    require_own,
    require_paths,
    say_fitting,
)
from deploy.stages.session import Session
from deploy.stages.sizing import say_moved
from deploy.stages.supervision import Metrics, SeedsDone, Supervision, finished
from deploy.workers.gang import LearnerGang
from learner.supervised.examples import EncodedPair

_SFT_HELD_OUT = 0.02
"""Share of the demonstrations that no supervised policy is trained on."""
_REFERENCES = 512
"""Demonstrations that the reward model is centred on."""
_CHOSEN_BY = Logged.ACCURACY_HELDOUT
_STEPS = "steps"


def run_sft(session: Session, config: RunConfig) -> dict[str, float]:
    """Train the supervised policy; writes ``sft/``, returns metrics."""
    require_own("sft", config.reuse.sft)
    require_paths(config.data.demonstrations, "data.demonstrations", "sft")
    record = check_inputs(session, config, "sft")
    records = read_demonstrations(config.data.demonstrations)
    pairs, fitting = encode_pairs(records, session.tokenizer(), config)
    say_fitting(session.console, fitting)
    fitting.require(len(pairs), 2, "sft (1 is held out)")
    train, held_out = hold_out(pairs, _SFT_HELD_OUT, config.seed, same_pair)
    record()

    def finish(gang: LearnerGang, _: Metrics) -> Metrics:
        gang.export_stage(session.folder.sft.path)
        return {}

    training = Supervision(
        session,
        config,
        "sft",
        "supervised policy",
        begin=lambda gang: gang.begin_sft(config, train, held_out),
    )
    before, metrics, total = training.run(finish)
    tokens = sum(len(pair.prompt) + len(pair.response) for pair in train)
    metrics |= _size(before, config.sft.epochs, tokens)
    log_metrics(session, "sft", total, metrics)
    record_end(session, "sft", session.folder.sft.path)
    training.clear()
    add_card(session.folder.sft.path, config, "sft")
    say_moved(session.console, "sft", total, metrics, pretrained=config.pretrained)
    return metrics


def once(session: Session, config: RunConfig, stage: Literal["sft", "reward"]) -> Metrics:
    """Run a stage of a pipeline, unless this run has done it already; returns its metrics."""
    run = {"sft": run_sft, "reward": run_reward}[stage]
    done = finished(config, stage)
    if done is None:
        return run(session, config)
    say(session.console, ("  was done before", "dim"))
    return done


def encoded_comparisons(session: Session, config: RunConfig) -> Divided:
    """Read the comparisons in tokens: those to train on, and those held out."""
    require_own("reward_model", config.reuse.reward_model)
    require_paths(config.data.comparisons, "data.comparisons", "reward")
    records = read_comparisons(config.data.comparisons)
    tokenizer, seen = _as_the_reward_model_reads(session, config)
    encoded, fitting = encode_comparisons(records, tokenizer, seen)
    say_fitting(session.console, fitting)
    fitting.require(len(encoded), 2, "reward (1 is held out)")
    found = divided(encoded, config.reward_model.held_out, config.seed)
    if found.left_out:
        say(
            session.console,
            f"  {found.left_out} comparisons are left out: their prompts are held out",
        )
    return found


def _as_the_reward_model_reads(session: Session, config: RunConfig) -> tuple[Tokenizer, RunConfig]:
    """Return the reward model's tokenizer, and the recipe with the room of its context."""
    own = config.reward_model.model
    if own is None:
        return session.tokenizer(), config
    return load_tokenizer(own.start), config.model_copy(update={"model": own})


def run_reward(session: Session, config: RunConfig) -> dict[str, float]:
    """Train reward models and keep the most accurate; writes ``reward_model/``, returns metrics.

    With `reward_model.keep_seeds` the others are kept too, beside it.
    """
    require_own("reward_model", config.reuse.reward_model)
    require_paths(config.data.comparisons, "data.comparisons", "reward")
    record = check_inputs(session, config, "reward")
    data = encoded_comparisons(session, config)
    tokenizer, seen = _as_the_reward_model_reads(session, config)
    reference = reference_pairs(seen, tokenizer)
    record()
    epochs = config.reward_model.epochs
    results = session.folder.reward_model.path, session.folder.reward_seeds
    done = SeedsDone(session, "reward", results)
    if not done.metrics:
        shutil.rmtree(session.folder.reward_seeds, ignore_errors=True)  # of another training
    tokens = sum(2 * len(c.prompt) + len(c.chosen) + len(c.rejected) for c in data.train)
    for seed in range(len(done.metrics), config.reward_model.seeds):

        def begin(gang: LearnerGang, seed: int = seed) -> int:
            start = reward_start(config)
            return gang.begin_reward(config, data.train, data.held_out, data.reported, start, seed)

        def finish(gang: LearnerGang, found: Metrics, seed: int = seed) -> Metrics:
            shift = gang.shift(reference)
            if all(found[_CHOSEN_BY] > other[_CHOSEN_BY] for other in done.metrics):
                gang.export_stage(session.folder.reward_model.path)
            if config.reward_model.keep_seeds:
                gang.export_stage(session.folder.reward_seed(seed).path)
            return shift

        training = Supervision(
            session, config, "reward", f"reward model {seed + 1}", begin=begin, part=f"-{seed:03d}"
        )
        before, metrics, total = training.run(finish)
        done.add(metrics | _size(before, epochs, tokens) | {_STEPS: total})
        training.clear()
    best = max(done.metrics, key=lambda metrics: metrics[_CHOSEN_BY])
    total = round(best.pop(_STEPS))
    log_metrics(session, "reward", total, best)
    record_end(session, "reward", *results)
    done.clear()
    say_moved(session.console, "reward", total, best, pretrained=seen.pretrained)
    return best


def _size(before: dict[str, float], epochs: float, tokens: int) -> dict[str, float]:
    """Return how much a stage was trained on, and its held-out loss before the first step."""
    return {
        Logged.HELDOUT_LOSS_BEFORE: before[Logged.HELDOUT_LOSS],
        Logged.EPOCHS: epochs,
        Logged.TOKENS: round(epochs * tokens),
    }


def reference_pairs(config: RunConfig, tokenizer: Tokenizer) -> list[EncodedPair]:
    """Read the first demonstrations that fit; the reward model is shifted to give them mean 0."""
    require_paths(config.data.demonstrations, "data.demonstrations", "centring the reward model")
    records = read_demonstrations(config.data.demonstrations)
    pairs, fitting = encode_pairs(records, tokenizer, config, limit=_REFERENCES)
    fitting.require(len(pairs), 1, "centring the reward model")
    return pairs
