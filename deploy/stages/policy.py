"""Policy training as a stage: whether it can go on, and a controller that does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config.earlier import saved_config
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.data.tokenizer import Tokenizer
from common.errors import ClusterError, ConfigError
from common.metric_catalogue import Logged
from deploy.control.issuing import mixed
from deploy.control.status import Status
from deploy.health.checks import verdicts
from deploy.health.history import History, Verdict
from deploy.run_folder import checkpoints
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.lock import at_work
from deploy.run_folder.log_lines import Line, read_lines
from deploy.run_folder.paths import anchored, rebased
from deploy.run_folder.progress import is_final, recorded_facts
from deploy.run_folder.resume_rules import Change, require_resumable
from deploy.run_folder.weights import is_there, policy_start, reward_weights
from deploy.screen import say, spark
from deploy.stages.controller_actor import (
    RemoteController,
    controller_name,
    living_controller,
    start_controller,
)
from deploy.stages.driver import follow
from deploy.stages.encoding import read_encoded_prompts, read_held_out
from deploy.stages.preparation import check_inputs, require_paths, say_fitting
from deploy.stages.session import Session
from deploy.stages.sizing import ends_of, say_trained
from deploy.workers.attach import named_address, own_address
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool
from deploy.workers.preflight import require_trainable

_SETTLES_S = 20.0
"""For which a controller may be beginning, or dying."""
_CUT_OFF_S = 150.0
"""For which one may go on on a node that its cluster has lost: Ray ends there after a minute in
which it hears nothing, and needs some time to."""
_PATIENCE_S = 2.0
"""After which such a wait is told."""
_LOOK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What it means to go on with a run: what has changed, or that it is finished."""

    changed: list[Change]
    """How the recipe differs from the newest checkpoint's."""
    facts: dict[str, Any] | None
    """The controller's facts of a run that is finished; None where there is something to train."""
    iteration: int = 0
    """How many iterations its newest checkpoint has behind it."""
    checkpoint: Path | None = None
    """That checkpoint's folder; None where there is none."""


def resumption_of(config: RunConfig) -> Resumption:
    """Compare the recipe with the run's newest checkpoint, if it has one; nothing starts for it.

    A run that was moved has not changed by that.

    Raises:
        ConfigError: policy cannot be trained under this recipe, or a field changed that cannot
            change; each is named with both values.
    """
    require_trainable(config)
    checkpoint = checkpoints.newest(config.run_dir)
    if checkpoint is None:
        return Resumption(changed=[], facts=None)
    state = checkpoint[1]
    changed = require_resumable(
        rebased(saved_config(state["config"]), config.run_dir),
        config,
        state["iteration"],
        config.run_dir,
        RunInputs(config.run_dir).recorded("train"),
    )
    facts = recorded_facts(config.run_dir)
    if not (is_final(facts, config) and is_there(config.folder.policy)):
        facts = None
    return Resumption(
        changed=changed, facts=facts, iteration=state["iteration"], checkpoint=checkpoint[0]
    )


def tell(console: Console, config: RunConfig, resumption: Resumption) -> None:
    """Say that the run is finished, or where it goes on and what has changed since then."""
    if resumption.facts is not None:
        say(console, f"{config.run_dir} is finished; nothing to train")
        return
    for change in resumption.changed:
        say(console, f"changed: {change}")
    if resumption.checkpoint is not None:
        say(
            console,
            f"goes on after iteration {resumption.iteration} of {config.train.iterations}, from "
            f"{resumption.checkpoint}",
        )


def run_train(
    session: Session,
    config: RunConfig,
    pools: tuple[Pool, Pool] | None = None,
    stop_after: int | None = None,
    resumption: Resumption | None = None,
) -> dict[str, Any]:
    """Train the policy of an unfinished run; resumes from its newest checkpoint, if any.

    A controller does the work: the one that is at it already, or a new one. Returns its facts, or
    raises what stopped the run.
    """
    require_paths(config.data.prompts, "data.prompts", "train")
    if config.evaluate.every:
        require_paths(config.data.evaluation, "data.evaluation", "evaluate.every")
    config = anchored(config)
    controller, known = _controller_of(session, config), 0
    if controller is not None and stop_after is not None:
        raise ConfigError(
            f"--stop-after has no effect on {config.run_dir}, which is at work already; Ctrl-C in "
            "an attached command stops it with a checkpoint"
        )
    if controller is not None:
        say(session.console, (f"attached to {controller_name(config)}", "dim"))
    else:
        record = check_inputs(session, config, "train")
        tokenizer = session.tokenizer()
        prompts, fitting = read_encoded_prompts(config.data.prompts, tokenizer, config)
        say_fitting(session.console, fitting)
        mixed(config, prompts)  # what is wrong with it is said before anything starts
        held_out = _held_out(session, config, tokenizer, {prompt.uid for prompt in prompts})
        record()
        session.unlock()  # from here on the controller writes
        known = len(prompts)
        controller = _start(session, config, prompts, held_out, pools, stop_after)
    done = 0 if resumption is None else resumption.iteration
    with session.progress("policy", config.train.iterations, done) as bar:
        screen = _Screen(session.console, bar.update, read_lines(session.folder.metrics).lines)
        facts = follow(controller, config, screen)
    _say_end(session.console, config, facts)
    lines = read_lines(session.folder.metrics).lines
    screen.warn(verdicts(History.of(config, lines)))
    if known:  # who attached to a run has not read its prompts
        logged = {line.step: line.metrics for line in lines if line.stage == "train"}
        say_trained(
            session.console,
            logged,
            known,
            config.train.prompts_per_iteration,
            pretrained=config.pretrained,
        )
    return facts


def _say_end(console: Console, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Say what a user has to know of how training ended, beside its numbers."""
    for text in facts.get("untracked", ()):
        say(console, (text, "yellow"))
    if facts.get("out_of_patience") and facts["iterations"] < config.train.iterations:
        say(
            console,
            f"ended after {facts['iterations']} of {config.train.iterations} iterations, as "
            f"{config.evaluate.patience} evaluations in a row were no better (evaluate.patience); "
            "resumed with a larger patience, or null, it goes on",
        )


def _controller_of(session: Session, config: RunConfig) -> RemoteController | None:
    """Return the controller that is at work on a run; None where a new one is to begin.

    One that has just begun has no name yet, and one that is just dying still holds the lock: both
    are waited for. So is one on a node that is cut off: it writes until its Ray ends.

    Raises:
        ClusterError: somebody writes into the run's folder for longer, whom this cluster does not
            know.
    """
    begin, told = time.monotonic(), False
    while True:
        controller = living_controller(config)
        if controller is not None or not session.attached:
            return controller
        holder, waited = at_work(config.run_dir), time.monotonic() - begin
        if holder is None:
            if named_address(config) is None:  # its own cluster ends with it
                raise _elsewhere(config)
            session.attached = False
        elif holder.cluster != own_address():
            if waited > _SETTLES_S:
                raise _elsewhere(config)
        elif waited > _CUT_OFF_S:
            raise ClusterError(
                f"{config.run_dir} is still written by {holder}, whom this cluster does not reach; "
                "end it there, and give the command again"
            )
        elif waited > _PATIENCE_S and not told:
            text = f"waits for {holder}: it has just begun, is about to end, or is cut off"
            say(session.console, (text, "dim"))
            told = True
        time.sleep(_LOOK_S)


def _elsewhere(config: RunConfig) -> ClusterError:
    return ClusterError(
        f"{config.run_dir} is at work, and not in this cluster: leave --address out, or give the "
        "command again if the run has just begun or ended"
    )


def _held_out(
    session: Session, config: RunConfig, tokenizer: Tokenizer, trained: Set[str]
) -> list[EncodedPrompt]:
    """Read what is asked while training goes on; nothing where the recipe does not want it.

    What is among the prompts that are trained on, by their uids, is told.
    """
    if not config.evaluate.every:
        return []
    prompts, fitting = read_held_out(tokenizer, config)
    say_fitting(session.console, fitting)
    require_known_source(config.evaluate.metric, prompts)
    if both := sum(prompt.uid in trained for prompt in prompts):
        text = f"{both} of {len(prompts)} held-out prompts (data.evaluation) are trained on too"
        say(session.console, (text, "yellow"))
    return prompts


def require_known_source(metric: str, prompts: Sequence[EncodedPrompt]) -> None:
    """Refuse an `evaluate.metric` of a source that no held-out prompt is of. Raises ConfigError."""
    kind, _, source = metric.partition("/")
    there = sorted({prompt.source or "" for prompt in prompts})
    if kind == "score" and source and source not in there:
        raise ConfigError(
            f"evaluate.metric={metric}: no held-out prompt is of this source; there are "
            f"{', '.join(filter(None, there)) or 'none with a source'}"
        )


def _start(
    session: Session,
    config: RunConfig,
    prompts: list[EncodedPrompt],
    held_out: list[EncodedPrompt],
    pools: tuple[Pool, Pool] | None,
    stop_after: int | None,
) -> RemoteController:
    """Start a controller with the session's workers where it has some, else with its own."""
    started = session.started_gang()
    return start_controller(
        config,
        prompts,
        started or LearnerGang(config, config.name, start=False),
        pools or make_pools(session, config, start=False),
        stop_after,
        held_out,
        detached=started is None and pools is None,
    )


def start_pools(session: Session, config: RunConfig) -> tuple[Pool, Pool]:
    """Start rollout actors and reward workers that end with the session."""
    rollout, reward = make_pools(session, config, start=True)
    return session.keep(rollout), session.keep(reward)


def make_pools(session: Session, config: RunConfig, *, start: bool) -> tuple[Pool, Pool]:
    """Make pools of rollout actors and reward workers, filled when `start` is True."""
    tokenizer = session.folder.tokenizer
    begins = policy_start(config)
    reward = reward_weights(config) if config.reward_service.needs_model else None
    return (
        rollout_pool(config, config.name, tokenizer, begins, start=start),
        reward_pool(config, config.name, tokenizer, begins, reward, start=start),
    )


def outcome_of(config: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what became of a run, as its command shows it: what the policy does, then counts.

    The hash of the weights and the counts that are 0 stand in ``result.json`` alone.
    """
    lines = read_lines(config.folder.metrics).lines
    # An iteration that was trained again after a failure is there twice: the later one counts.
    steps = list({line.step: line.metrics for line in lines if line.stage == "train"}.values())
    shown: dict[str, Any] = {}
    few = 0
    for metric in (Logged.SCORE, Logged.KL, Logged.RESPONSE_LENGTH, Logged.ENTROPY):
        values = [step[metric] for step in steps if metric in step]
        if values:
            ends = ends_of(values)
            shown[metric], few = f"{ends.first:.4g} -> {ends.last:.4g}", ends.of
    shown["iterations"] = f"{facts['iterations']} of {config.train.iterations}"
    if shown:
        shown["iterations"] += f"; a -> b: means of the first {few} and of the last {few}"
    if facts["finished"]:
        shown["policy"] = config.folder.policy.path
    else:
        shown["carry on"] = f"talipot train --resume {config.run_dir}"
    shown["rollouts trained"] = facts["rollouts_trained"]
    counts = ("rollouts_dropped", "worker_failures", "learner_restarts", "leases_reissued")
    return shown | {name.replace("_", " "): facts[name] for name in counts if facts[name]}


_BENEATH = {Logged.SCORE: "score", Logged.KL: "KL", Logged.ENTROPY: "entropy"}
_DRAWN = 8
"""Iterations in a little picture."""


class _Screen:
    """Shows a run while it works: its bar, and what a health check begins to find wrong."""

    def __init__(
        self, console: Console, update: Callable[[int, str], None], before: Sequence[Line]
    ) -> None:
        """Go on after the log's lines `before`."""
        self._console, self._update = console, update
        self._wrong: set[tuple[str, str]] = set()
        self._seen = {line.step: line.metrics for line in before if line.stage == "train"}
        # A file has no use for pictures, and some terminals no letters for them.
        self._draws = console.is_terminal and console.encoding.startswith("utf")

    def __call__(self, status: Status) -> None:
        """Show where the run is."""
        if status.policy_version < 0:
            return  # it has not read its checkpoint yet
        # For a moment, and after a restart of the learner, they are of another iteration.
        if status.metrics.get(Logged.POLICY_VERSION) == status.iteration:
            self._seen[status.iteration] = status.metrics
        self._update(status.iteration, "  ".join(self._notes(status)))
        self.warn(status.health)

    def _notes(self, status: Status) -> Iterator[str]:
        """Yield what stands beneath the bar, what matters most first."""
        last = self._seen.get(status.iteration, status.metrics)
        steps = sorted(step for step in self._seen if step <= status.iteration)[-_DRAWN:]
        for metric, name in _BENEATH.items():
            if metric in last:
                values = [self._seen[s][metric] for s in steps if metric in self._seen[s]]
                drawn = f" {spark(values)}" if self._draws and len(values) > 1 else ""
                yield f"{name} {last[metric]:.2f}{drawn}"
        if Logged.TOKENS_PER_SECOND in last:
            yield f"{last[Logged.TOKENS_PER_SECOND]:.0f} tokens/s"
        yield f"{status.rollout_workers + status.reward_workers} workers"

    def warn(self, found: Sequence[Verdict]) -> None:
        """Say what was not wrong when it was looked at last."""
        for verdict in found:
            if (verdict.check, verdict.severity) not in self._wrong:
                style = "bold red" if verdict.severity == "critical" else "bold yellow"
                say(
                    self._console,
                    (f"{verdict.severity} ", style),
                    f"iteration {verdict.iteration}: {verdict.evidence}; {verdict.advice} ",
                    (f"({verdict.section})", "dim"),
                )
        self._wrong = {(verdict.check, verdict.severity) for verdict in found}
