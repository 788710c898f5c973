"""The stages of a run, each usable alone: tokenizer, sft, reward, train."""

from __future__ import annotations

import math
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors.prompts import EncodedPrompt
from common.config import RunConfig
from common.data import read_comparisons, read_demonstrations
from common.errors import ConfigError, DataError
from common.files import is_utf8
from common.fitting import Fitting
from common.recipe import save_config, saved_config
from common.tokenizer import Tokenizer
from deploy import checkpoints
from deploy.changes import Change, require_resumable
from deploy.driver import controller_name, follow, living_controller, start_controller
from deploy.encoding import (
    encode_comparisons,
    encode_pairs,
    hold_out,
    read_encoded_prompts,
    same_comparison,
    same_pair,
)
from deploy.ends import at_the_end
from deploy.facts import Status, recorded_facts
from deploy.gang import LearnerGang
from deploy.placement import reward_pool, rollout_pool
from deploy.pool import Pool
from deploy.preflight import require_trainable
from deploy.run_inputs import RunInputs, reads_of
from deploy.run_paths import anchored
from deploy.run_tokenizer import run_tokenizer
from deploy.screen import say
from deploy.session import Session
from learner.supervised import EncodedComparison, EncodedPair

_REFERENCES = 512
"""Demonstrations that the reward model is centred on."""

# -------------------------------------------------------------------------- tokenizer and encoding


def prepare_tokenizer(session: Session, config: RunConfig) -> RunConfig:
    """The run's tokenizer, made at its first use; returns the config with the model's vocabulary
    filled in.

    Raises:
        ConfigError: the recipe asks for another tokenizer than the one that results of this run
            stand on, model.vocab_size is set to something else than the tokenizer has, or
            rollout.stop_ids names a token that it has not.
    """
    config = anchored(config)
    # Where the run is at work already, its tokenizer is there and nothing is written.
    tokenizer = run_tokenizer(session.run_dir, config, lambda: session.lock("train"))
    size = config.model.vocab_size
    if size not in (0, tokenizer.vocab_size):
        raise ConfigError(
            f"model.vocab_size={size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            "set it to 0 to take the tokenizer's"
        )
    unknown = [token for token in config.rollout.stop_ids if token >= tokenizer.vocab_size]
    if unknown:
        raise ConfigError(
            f"rollout.stop_ids: {unknown[0]} is no token; the tokenizer has "
            f"{tokenizer.vocab_size}, from 0"
        )
    model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


def say_fitting(console: Console, fitting: Fitting) -> None:
    """Say what became of the records that were too long."""
    for line in fitting.said():
        say(console, (line, "yellow"))


# -------------------------------------------------------------------------- supervised stages


def run_sft(session: Session, config: RunConfig) -> dict[str, float]:
    """Train the supervised policy; writes ``sft/policy.safetensors``."""
    _require(config.data.demonstrations, "data.demonstrations", "sft")
    begin = _checked(session, config, "sft")
    records = read_demonstrations(config.data.demonstrations)
    pairs, fitting = encode_pairs(records, session.tokenizer(), config)
    say_fitting(session.console, fitting)
    fitting.require(len(pairs), 2, "sft (1 is held out)")
    train, held_out = hold_out(pairs, 0.02, config.seed, same_pair)
    begin()
    gang = session.gang()
    total = gang.call("begin_sft", config, ray.put(train), ray.put(held_out))
    metrics = _advance(session, "sft", "supervised policy", total)
    metrics |= gang.call("evaluate")
    gang.call("export_stage", str(session.sft_weights.parent))
    with_log(session, "sft", total, metrics)
    return metrics


def encoded_comparisons(
    session: Session, config: RunConfig
) -> tuple[list[EncodedComparison], list[EncodedComparison]]:
    """Comparisons in tokens, to train on and held out."""
    _require(config.data.comparisons, "data.comparisons", "reward")
    records = read_comparisons(config.data.comparisons)
    encoded, fitting = encode_comparisons(records, session.tokenizer(), config)
    say_fitting(session.console, fitting)
    fitting.require(len(encoded), 2, "reward (1 is held out)")
    return hold_out(encoded, config.reward_model.held_out, config.seed, same_comparison)


def run_reward(session: Session, config: RunConfig) -> dict[str, float]:
    """Train reward models and keep the most accurate; writes ``reward_model/``."""
    _require(config.data.comparisons, "data.comparisons", "reward")
    begin = _checked(session, config, "reward")
    train, held_out = encoded_comparisons(session, config)
    reference = ray.put(reference_pairs(config, session.tokenizer()))
    begin()
    data = ray.put(train), ray.put(held_out)
    gang, best = session.gang(), -math.inf
    metrics: dict[str, float] = {}
    for seed in range(config.reward_model.seeds):
        total = gang.call("begin_reward", config, *data, str(session.sft_weights), seed)
        found = _advance(session, "reward", f"reward model {seed + 1}", total)
        found |= gang.call("evaluate")
        if found["accuracy_heldout"] > best:
            best = found["accuracy_heldout"]
            metrics = found | gang.call("shift", reference)
            gang.call("export_stage", str(session.reward_weights.parent))
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
            metrics = gang.call("advance", portion)
            seconds = time.perf_counter() - begin
            if "tokens" in metrics:
                metrics["tokens_per_second"] = metrics.pop("tokens") / seconds
            step = min(total, done + portion)
            log.write(stage, step, metrics)
            bar.update(step, f"loss {metrics['loss']:.3f}")
    return metrics


# -------------------------------------------------------------------------- policy training


def run_train(
    session: Session,
    config: RunConfig,
    pools: tuple[Pool, Pool] | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train the policy under a controller; resumes from the run's newest checkpoint, if any.

    Returns the controller's facts. Raises whatever stopped the run.
    """
    _require(config.data.prompts, "data.prompts", "train")
    require_trainable(config)
    config = anchored(config)
    changed, facts = resumable(config)
    for change in changed:
        say(session.console, f"changed: {change}")
    if facts is not None:
        say(session.console, finished(config))
        return facts
    controller = living_controller(config)
    if controller is not None:
        say(session.console, (f"attached to {controller_name(config)}", "dim"))
    else:
        begin = _checked(session, config, "train")
        tokenizer = session.tokenizer()
        prompts, fitting = read_encoded_prompts(config.data.prompts, tokenizer, config)
        say_fitting(session.console, fitting)
        begin()
        session.unlock()  # the writer is the controller now
        controller = _start(session, config, prompts, pools, stop_after)
    with session.progress("policy", config.train.iterations) as bar:
        return follow(controller, config, lambda status: _show(bar.update, status))


def resumable(config: RunConfig) -> tuple[list[Change], dict[str, Any] | None]:
    """Compare with the run's newest checkpoint, if it has one: what has changed, but for the run's
    name and place, and the facts of a run that is finished already.

    Raises:
        ConfigError: a field changed that cannot; each is named with both values.
    """
    found = checkpoints.newest(config.run_dir)
    if found is None:
        return [], None
    state = found[1]
    saved = saved_config(state["config"])
    recorded = RunInputs(config.run_dir).recorded("train")
    changed = require_resumable(saved, config, state["iteration"], config.run_dir, recorded)
    facts = recorded_facts(config.run_dir)
    if facts is not None and facts["iterations"] < config.train.iterations:
        facts = None
    return [change for change in changed if change.field not in ("name", "output")], facts


def finished(config: RunConfig) -> str:
    """What is said of a run that is finished."""
    return f"{config.run_dir} is finished; nothing to train"


def _start(
    session: Session,
    config: RunConfig,
    prompts: list[EncodedPrompt],
    pools: tuple[Pool, Pool] | None,
    stop_after: int | None,
) -> Any:
    """A controller with the session's workers where it has some, with its own where not."""
    # Workers of a controller that was killed a moment ago may still hold the plain names.
    name = f"{config.name}-{secrets.token_hex(2)}"
    started = session.started_gang()
    return start_controller(
        config,
        prompts,
        started or LearnerGang(config, name, start=False),
        pools or make_pools(session, config, name, start=False),
        stop_after,
        detached=started is None and pools is None,
    )


def start_pools(session: Session, config: RunConfig) -> tuple[Pool, Pool]:
    """Rollout actors and reward workers that end with the session."""
    rollout, reward = make_pools(session, config, config.name, start=True)
    return session.keep(rollout), session.keep(reward)


def make_pools(session: Session, config: RunConfig, name: str, *, start: bool) -> tuple[Pool, Pool]:
    """Pools of rollout actors and reward workers, filled when `start` is True."""
    tokenizer = session.tokenizer_path
    reward = session.reward_weights if config.reward_service.needs_model else None
    return (
        rollout_pool(config, name, tokenizer, session.sft_weights, start=start),
        reward_pool(config, name, tokenizer, session.sft_weights, reward, start=start),
    )


def with_log(session: Session, stage: str, step: int, metrics: dict[str, float]) -> None:
    """Append one line to the run's log."""
    log = session.log()
    with at_the_end(log.close):
        log.write(stage, step, metrics)


def _checked(session: Session, config: RunConfig, stage: str) -> Callable[[], None]:
    """Make this session the run's writer, and compare what a stage is about to read with what the
    run stands on. What is returned writes recipe and inputs down, once they are known to be good.

    Raises:
        StorageError: another stage is writing into the run's folder.
        DataError: an input is missing, or has changed since results of this run were made from it.
        ConfigError: the stage would replace what training stands on.
    """
    session.lock(stage)
    inputs = RunInputs(session.run_dir)
    inputs.require_repeat(stage, config)
    found, told = inputs.check(stage, reads_of(stage, config))
    for line in told:
        say(session.console, f"changed: {line}")

    def begin() -> None:
        save_config(config, session.run_dir / "config.yaml")
        inputs.begin(stage, config, found)

    return begin


def _show(update: Callable[[int, str], None], status: Status) -> None:
    metrics = status.metrics
    note = "  ".join(
        f"{name} {metrics[name]:.2f}" for name in ("score", "kl", "entropy") if name in metrics
    )
    update(status.iteration, note)


def _require(paths: Sequence[str], field: str, stage: str) -> None:
    if not paths:
        raise ConfigError(f"{field} is empty; {stage} needs at least one file")


def reference_pairs(config: RunConfig, tokenizer: Tokenizer) -> list[EncodedPair]:
    """The first demonstrations that fit, whose mean score the reward model is shifted to 0 by."""
    _require(config.data.demonstrations, "data.demonstrations", "centring the reward model")
    records = read_demonstrations(config.data.demonstrations)
    pairs, fitting = encode_pairs(records, tokenizer, config, limit=_REFERENCES)
    fitting.require(len(pairs), 1, "centring the reward model")
    return pairs


def folder_of(run: str | Path) -> Path:
    """A run's folder from its path, absolute and by its own name; raises DataError for no run."""
    folder = Path(os.path.expanduser(run))
    if not is_utf8(str(folder)):
        raise DataError(f"{folder}: the path is not UTF-8; rename the folder")
    if not (folder / "config.yaml").exists():
        raise DataError(f"{folder}: not a run (no config.yaml)")
    # Behind a link or `..` is a folder with another name, under which its run is known.
    if folder.is_symlink() or ".." in folder.parts:
        return folder.resolve()
    return folder.absolute()


def recipe_of(folder: Path) -> Path:
    """A run's own recipe. It holds every section, so what is empty or cut off shows.

    Raises:
        DataError: it is, by a writer that was killed or a disk that was full.
    """
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf8", errors="replace")
    sections = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    if not text.endswith("\n") or not sections >= {"name", "model", "data", "train", "cluster"}:
        raise DataError(
            f"{path}: empty or cut off; put the run's recipe back (a checkpoint's state.json holds "
            "it under 'config')"
        )
    return path
