"""A supervised stage that outlives its ranks, and its command.

::

    begin --> advance --> checkpoint --> advance ... --> results
      ^          | a rank died, or the command did
      +----------+ from the newest checkpoint

A batch follows from the step alone, so a training that goes on from a checkpoint comes to the same
weights, bit for bit. Checkpoints lie in ``RUN/unfinished`` until the stage is done. One that was
made from other data or under other settings is not taken.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from common.config.run import RunConfig
from common.config.stages import RewardModelConfig, SftConfig
from common.endings import at_the_end
from common.errors import CheckpointError
from common.files import one_line, write_atomic
from common.metric_catalogue import Logged
from deploy.run_folder import checkpoints
from deploy.run_folder.failures import note_restart
from deploy.run_folder.fingerprints import difference, tensors_in
from deploy.run_folder.inputs import RunInputs, settings_of
from deploy.run_folder.log_lines import read_lines
from deploy.run_folder.reads import reads_of
from deploy.run_folder.resume_rules import RULES, prefix_of
from deploy.screen import say
from deploy.stages.session import Session
from deploy.workers.gang import LearnerGang, LearnerLost

_PORTIONS: Final = 20
"""A stage writes about so many lines of the log, or more."""
_LONGEST: Final = 50
"""A line is of so many steps, or fewer."""
_AT_FIRST: Final = 50
"""Steps of the first call, while nobody knows how long one takes."""

Metrics = dict[str, float]
Finish = Callable[[LearnerGang, Metrics], Metrics]
"""Writes the results, and returns metrics beside those that it is given."""


def made_from(run_dir: Path, stage: str) -> Mapping[str, Any]:
    """Return what the weights of a stage that has begun depend on.

    What changes neither data nor mathematics may be another one when it goes on, as with policy
    training.
    """
    facts = RunInputs(run_dir).stages[stage]
    settings = {name: value for name, value in facts.settings.items() if not _is_free(name)}
    reads = {name: [file.xxh3_128 for file in files] for name, files in facts.reads.items()}
    found: Mapping[str, Any] = json.loads(json.dumps({"settings": settings, "reads": reads}))
    return found


def finished(config: RunConfig, stage: str) -> Metrics | None:
    """Return the metrics of a stage that this run has done already, of the same data and settings.

    None where it has not, or where something of it has changed since.

    Raises:
        DataError: an input is missing, or cannot be read.
    """
    inputs = RunInputs(config.run_dir)
    facts = inputs.stages.get(stage)
    if facts is None or not facts.writes or facts.settings != settings_of(stage, config):
        return None
    paths = [config.run_dir / name for name in facts.writes]
    if not all(path.exists() for path in paths):
        return None
    left = {name: [inputs.look(path)] for name, path in zip(facts.writes, paths, strict=True)}
    for was, now in ((facts.writes, left), (facts.reads, inputs.look_all(reads_of(stage, config)))):
        if was.keys() != now.keys() or any(difference(name, was[name], now[name]) for name in was):
            return None
    lines = read_lines(config.folder.metrics).lines
    done = [x.metrics for x in lines if x.stage == stage and Logged.EPOCHS in x.metrics]
    return dict(done[-1]) if done else None


def _is_free(field: str) -> bool:
    return not field.startswith(("sft.", "reward_model.")) and RULES[prefix_of(field)][0] != "fixed"


@dataclass
class _Position:
    """Where a training is."""

    before: Metrics
    """Before the first step."""
    done: int = 0
    """Steps."""
    seconds: float = 0.0
    """That the steps since the last line of the log took."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Position:
        """Read it from a checkpoint."""
        seconds = state.get("seconds", 0.0)  # missing in checkpoints of earlier versions
        return cls(state["before"], state["step"], seconds)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of it."""
        return {"before": self.before, "step": self.done, "seconds": self.seconds}


class Supervision:
    """One training of a supervised stage."""

    def __init__(
        self,
        session: Session,
        config: RunConfig,
        stage: str,
        title: str,
        *,
        begin: Callable[[LearnerGang], int],
        part: str = "",
    ) -> None:
        """Nothing starts yet.

        Args:
            session: holds the gang, the lock and the log.
            config: the recipe.
            stage: `sft` or `reward`, whose inputs are recorded.
            title: of its progress bar.
            begin: builds the stage on a gang, and returns its number of steps.
            part: tells trainings of one stage apart.
        """
        self._session, self._config, self._stage, self._title = session, config, stage, title
        self._begin, self._from = begin, made_from(session.run_dir, stage)
        self._folder = session.folder.unfinished(stage + part)

    @property
    def _settings(self) -> SftConfig | RewardModelConfig:
        return self._config.sft if self._stage == "sft" else self._config.reward_model

    def run(self, finish: Finish) -> tuple[Metrics, Metrics, int]:
        """Train, and have the results written; a gang whose rank died is followed by another.

        Args:
            finish: called when all steps are taken; may be called again.

        Returns:
            Metrics before the first step, those after the last one, and the number of steps.

        Raises:
            LearnerLost: ranks died more than `learner.max_restarts` times, at their start too.
        """
        most = self._config.learner.max_restarts
        for restarts in count():
            try:
                return self._attempt(self._session.gang(), finish)
            except LearnerLost as error:
                self._session.end_gang()  # the others wait for the one that is lost
                if restarts == most:
                    raise LearnerLost(
                        f"{one_line(error)}; the learner was restarted {most} times "
                        f"(learner.max_restarts); carry on with {self._again}"
                    ) from None
                told = f"{self._stage}: {one_line(error)}; it goes on with other ranks"
                say(self._session.console, (told, "yellow"))
                note_restart(self._session.folder.events, told)
        raise AssertionError("unreachable")

    def clear(self) -> None:
        """Remove the checkpoints: what was trained is recorded."""
        shutil.rmtree(self._folder.path, ignore_errors=True)

    @property
    def _again(self) -> str:
        return f"`talipot {self._stage} --resume {self._session.run_dir}`"

    def _attempt(self, gang: LearnerGang, finish: Finish) -> tuple[Metrics, Metrics, int]:
        total = self._begin(gang)
        newest = self._newest()
        if newest is None:
            at = _Position(gang.evaluate())
        else:
            folder, state = newest
            gang.load_stage(folder, state["learner"])
            at = _Position.of(state)
            say(self._session.console, (f"  {self._title}: goes on after step {at.done}", "dim"))
        metrics = self._advance(gang, at, total)
        metrics |= gang.evaluate()
        return at.before, metrics | finish(gang, metrics), total

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        try:
            newest = checkpoints.newest(self._folder.path)
        except CheckpointError as error:
            told = f"starts again from step 0: {one_line(error)}"
        else:
            if newest is None or newest[1]["from"] == self._from:
                return newest
            told = self._other(newest[1])
        say(self._session.console, (f"  {self._title}: {told}", "yellow"))
        shutil.rmtree(self._folder.path)
        return None

    def _other(self, state: Mapping[str, Any]) -> str:
        """Say why a checkpoint is not taken."""
        differing = sorted(
            name
            for kind in ("settings", "reads")
            for name in state["from"][kind].keys() | self._from[kind].keys()
            if state["from"][kind].get(name) != self._from[kind].get(name)
        )
        return (
            f"starts again from step 0: the checkpoint of step {state['step']} was made with "
            f"another {', '.join(differing)}"
        )

    def _advance(self, gang: LearnerGang, at: _Position, total: int) -> Metrics:
        """Take all steps that are left, in portions; return the metrics of the last portion.

        A portion gives one line of the log. A portion that takes longer than the time between
        checkpoints is done in several calls; its line is the same, but for what is measured by the
        clock. Held-out data is looked at each `evaluate_every` steps before the last one; 0 is
        never.
        """
        portion = max(1, min(total // _PORTIONS, _LONGEST))
        every, saves_every = self._settings.evaluate_every, self._settings.checkpoint_every_s
        looks = {*range(every, total, every)} if every else set[int]()
        ends = sorted({*range(portion, total, portion), total} | looks)
        begins, metrics = {0, *ends}, Metrics()
        most, saved, log = _AT_FIRST, time.monotonic(), self._session.log()
        with (
            at_the_end(log.close),
            self._session.progress(self._title, total, at.done) as bar,
        ):
            while at.done < total:
                steps = min(most, next(end for end in ends if end > at.done) - at.done)
                begin, anew = time.perf_counter(), at.done in begins
                metrics = gang.advance(steps, anew=anew)
                seconds = time.perf_counter() - begin
                at.done += steps
                at.seconds = seconds + (0.0 if anew else at.seconds)
                if "tokens" in metrics:
                    metrics[Logged.TOKENS_PER_SECOND] = metrics.pop("tokens") / at.seconds
                if at.done in looks:
                    metrics |= gang.evaluate()
                if at.done in begins:
                    log.write(self._stage, at.done, metrics)
                bar.update(at.done, f"loss {metrics[Logged.LOSS]:.3f}")
                # A call that lasts longer than the time between checkpoints would lose more.
                most = max(1, int(max(1.0, saves_every) * steps / seconds))
                if at.done < total and time.monotonic() - saved >= saves_every:
                    self._save(gang, at)
                    saved = time.monotonic()
        return metrics

    def _save(self, gang: LearnerGang, at: _Position) -> None:
        def fill(folder: Path) -> dict[str, Any]:
            learner = gang.save_stage(folder)
            return {"from": self._from, "learner": learner} | at.state()

        checkpoints.write(self._folder.path, at.done, fill, keep=1, then=self._again)


class SeedsDone:
    """The trainings of a stage of several that are done already, with their metrics.

    They count as long as what they wrote is there, unchanged, and was made from the same.
    """

    def __init__(self, session: Session, stage: str, results: Sequence[Path]) -> None:
        """Read what an interrupted command has left, or remove it.

        Args:
            session: of the run.
            stage: whose trainings they are.
            results: folders that they write weights into.
        """
        self._folder, self._results = session.folder.unfinished(stage).path, results
        self._inputs, self._from = RunInputs(session.run_dir), made_from(session.run_dir, stage)
        self.metrics: list[Metrics] = []
        with suppress(OSError, ValueError, LookupError, TypeError):  # then none is done
            state = json.loads(self._file.read_bytes())
            if state["from"] == self._from and state["wrote"] == self._wrote():
                self.metrics = state["metrics"]
        if not self.metrics:
            self.clear()

    @property
    def _file(self) -> Path:
        return self._folder / "done.json"

    def _wrote(self) -> dict[str, str]:
        paths = [path for folder in self._results for path in tensors_in(folder)]
        return {str(path): self._inputs.look(path).xxh3_128 for path in paths if path.exists()}

    def add(self, metrics: Metrics) -> None:
        """Note that another one is done."""
        self.metrics.append(metrics)
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {"from": self._from, "metrics": self.metrics, "wrote": self._wrote()}
        write_atomic(self._file, [json.dumps(state).encode()])

    def clear(self) -> None:
        """Remove what was noted."""
        shutil.rmtree(self._folder, ignore_errors=True)
