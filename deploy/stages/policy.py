"""The stages of a run, each usable alone: tokenizer, sft, reward, train."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from common.config.recipe import saved_config
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from deploy.control.status import Status, recorded_facts
from deploy.run_folder import checkpoints
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.paths import anchored
from deploy.run_folder.resume_rules import Change, require_resumable
from deploy.screen import say
from deploy.stages.controller_actor import (
    RemoteController,
    controller_name,
    living_controller,
    start_controller,
)
from deploy.stages.driver import follow
from deploy.stages.encoding import (
    read_encoded_prompts,
)
from deploy.stages.preparation import checked, require_paths, say_fitting
from deploy.stages.session import Session
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool
from deploy.workers.preflight import require_trainable


def run_train(
    session: Session,
    config: RunConfig,
    pools: tuple[Pool, Pool] | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train the policy under a controller; resumes from the run's newest checkpoint, if any.

    Returns the controller's facts. Raises whatever stopped the run.
    """
    require_paths(config.data.prompts, "data.prompts", "train")
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
        begin = checked(session, config, "train")
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
) -> RemoteController:
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
    tokenizer = session.folder.tokenizer
    reward = session.folder.reward_model.weights if config.reward_service.needs_model else None
    return (
        rollout_pool(config, name, tokenizer, session.folder.sft.weights, start=start),
        reward_pool(config, name, tokenizer, session.folder.sft.weights, reward, start=start),
    )


def _show(update: Callable[[int, str], None], status: Status) -> None:
    metrics = status.metrics
    note = "  ".join(
        f"{name} {metrics[name]:.2f}" for name in ("score", "kl", "entropy") if name in metrics
    )
    update(status.iteration, note)
