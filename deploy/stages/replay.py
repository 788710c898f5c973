"""Replay: a run's trajectory log through a fresh learner, which must end in the run's weights.

No rollout and no reward workers: the log holds what they produced. The run's folder is only read;
the replay has one of its own beside it, ``RUN.replay``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config.run import RunConfig
from common.endings import at_the_end
from common.errors import DataError, TrainingError
from common.metric_catalogue import Logged
from common.run_folder import RunFolder
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.lock import writing
from deploy.run_folder.paths import rebased
from deploy.run_folder.progress import recorded_facts
from deploy.run_folder.reads import reads_of
from deploy.stages.session import open_session
from deploy.workers.gang import LearnerGang
from learner.algorithms.schedule import auxiliary_phase_due
from learner.batch.trajectory_log import read_log

_SAME = ("train", "learner", "model", "seed", "rollout")
"""Sections that results depend on: where one of them changes, the learner begins again with it."""


def replay_run(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train again on a finished run's log; returns both hashes.

    Raises:
        DataError: the run is not finished, a file of its log is missing or damaged (named), or the
            weights or the tokenizer that it began with are others now.
        TrainingError: the weights differ.
    """
    recorded = recorded_facts(config.run_dir)
    if recorded is None:
        raise DataError(
            f"{config.run_dir}: not finished, so there are no weights to compare with; "
            f"`talipot train --resume {config.run_dir}` first"
        )
    iterations = int(recorded["iterations"])
    for iteration in range(iterations):  # what is missing or damaged is known before the work
        read_log(config.run_dir, iteration)
    RunInputs(config.run_dir).check("replay", reads_of("replay", config))
    folder = config.run_dir.with_name(f"{config.name}.replay")
    with open_session(config, console) as session, writing(folder, "replay"):
        gang = LearnerGang(config, f"{config.name}.replay", start=False)
        with at_the_end(gang.stop):
            gang.start()
            with session.progress("replay", iterations) as bar:
                _replay(gang, config, iterations, folder, bar.update)
            replayed = gang.export_policy(RunFolder(folder).policy.path)
    expected = recorded["weights_hash"]
    if replayed != expected:
        raise TrainingError(
            f"{config.run_dir}: replay of {iterations} iterations ended in weights {replayed}, the "
            f"run in {expected}; its log or its code has changed"
        )
    return {"iterations": iterations, "weights_hash": expected, "replayed_hash": replayed}


def _replay(
    gang: LearnerGang,
    run: RunConfig,
    iterations: int,
    folder: Path,
    show: Callable[[int, str], None],
) -> None:
    """Train on every iteration of a log, in order."""
    current: RunConfig | None = None
    for iteration in range(iterations):
        table, trained = read_log(run.run_dir, iteration)
        if current is None or any(getattr(trained, s) != getattr(current, s) for s in _SAME):
            # The weights to start from lie in the run's folder, wherever it was moved to.
            _take_over(gang, rebased(trained, run.run_dir), None if current is None else folder)
            current = trained
        metrics = gang.policy_phase(iteration, None, [table])
        if auxiliary_phase_due(trained.train.ppg, iteration):
            gang.auxiliary_phase(iteration)
        show(iteration + 1, f"score {metrics[Logged.SCORE]:.2f}")


def _take_over(gang: LearnerGang, config: RunConfig, folder: Path | None) -> None:
    """Go on under other settings, as the run did when it was resumed with them."""
    state: dict[str, Any] = {}
    if folder is not None:
        handed_over = folder / "handed-over"
        shutil.rmtree(handed_over, ignore_errors=True)
        handed_over.mkdir(parents=True)
        state = gang.save(handed_over)
    if gang.config.learner != config.learner:
        gang.config = config
        gang.restart()
    gang.begin_train(config)
    if folder is not None:
        gang.load(handed_over, state)
