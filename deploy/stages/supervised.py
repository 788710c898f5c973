"""The supervised stages: the supervised policy, and the reward model."""

from __future__ import annotations

import math
import time

from common.config.run import RunConfig
from common.data.records import read_comparisons, read_demonstrations
from common.data.tokenizer import Tokenizer
from common.endings import at_the_end
from deploy.stages.encoding import (
    encode_comparisons,
    encode_pairs,
    hold_out,
    same_comparison,
    same_pair,
)
from deploy.stages.preparation import checked, require_paths, say_fitting, with_log
from deploy.stages.session import Session
from learner.supervised.packing import EncodedComparison, EncodedPair

_REFERENCES = 512


"""Demonstrations that the reward model is centred on."""


def run_sft(session: Session, config: RunConfig) -> dict[str, float]:
    """Train the supervised policy; writes ``sft/policy.safetensors``."""
    require_paths(config.data.demonstrations, "data.demonstrations", "sft")
    begin = checked(session, config, "sft")
    records = read_demonstrations(config.data.demonstrations)
    pairs, fitting = encode_pairs(records, session.tokenizer(), config)
    say_fitting(session.console, fitting)
    fitting.require(len(pairs), 2, "sft (1 is held out)")
    train, held_out = hold_out(pairs, 0.02, config.seed, same_pair)
    begin()
    gang = session.gang()
    total = gang.begin_sft(config, train, held_out)
    metrics = _advance(session, "sft", "supervised policy", total)
    metrics |= gang.evaluate()
    gang.export_stage(session.folder.sft.path)
    with_log(session, "sft", total, metrics)
    return metrics


def encoded_comparisons(
    session: Session, config: RunConfig
) -> tuple[list[EncodedComparison], list[EncodedComparison]]:
    """Comparisons in tokens, to train on and held out."""
    require_paths(config.data.comparisons, "data.comparisons", "reward")
    records = read_comparisons(config.data.comparisons)
    encoded, fitting = encode_comparisons(records, session.tokenizer(), config)
    say_fitting(session.console, fitting)
    fitting.require(len(encoded), 2, "reward (1 is held out)")
    return hold_out(encoded, config.reward_model.held_out, config.seed, same_comparison)


def run_reward(session: Session, config: RunConfig) -> dict[str, float]:
    """Train reward models and keep the most accurate; writes ``reward_model/``."""
    require_paths(config.data.comparisons, "data.comparisons", "reward")
    begin = checked(session, config, "reward")
    train, held_out = encoded_comparisons(session, config)
    reference = reference_pairs(config, session.tokenizer())
    begin()
    gang, best = session.gang(), -math.inf
    metrics: dict[str, float] = {}
    for seed in range(config.reward_model.seeds):
        total = gang.begin_reward(config, train, held_out, session.folder.sft.weights, seed)
        found = _advance(session, "reward", f"reward model {seed + 1}", total)
        found |= gang.evaluate()
        if found["accuracy_heldout"] > best:
            best = found["accuracy_heldout"]
            metrics = found | gang.shift(reference)
            gang.export_stage(session.folder.reward_model.path)
    with_log(session, "reward", total, metrics)
    return metrics


def _advance(session: Session, stage: str, title: str, total: int) -> dict[str, float]:
    """Run all steps of a supervised stage in about twenty logged portions."""
    gang, portion = session.gang(), max(1, total // 20)
    metrics: dict[str, float] = {}
    log = session.log()
    with at_the_end(log.close), session.progress(title, total) as bar:
        for done in range(0, total, portion):
            begin = time.perf_counter()
            metrics = gang.advance(portion)
            seconds = time.perf_counter() - begin
            if "tokens" in metrics:
                metrics["tokens_per_second"] = metrics.pop("tokens") / seconds
            step = min(total, done + portion)
            log.write(stage, step, metrics)
            bar.update(step, f"loss {metrics['loss']:.3f}")
    return metrics


def reference_pairs(config: RunConfig, tokenizer: Tokenizer) -> list[EncodedPair]:
    """The first demonstrations that fit, whose mean score the reward model is shifted to 0 by."""
    require_paths(config.data.demonstrations, "data.demonstrations", "centring the reward model")
    records = read_demonstrations(config.data.demonstrations)
    pairs, fitting = encode_pairs(records, tokenizer, config, limit=_REFERENCES)
    fitting.require(len(pairs), 1, "centring the reward model")
    return pairs
