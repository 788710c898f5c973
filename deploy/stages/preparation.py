"""The beginning of every stage: the tokenizer, the run's inputs, and the right to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.data.fitting import Fitting
from common.endings import at_the_end
from common.errors import ConfigError
from deploy import trackers
from deploy.run_folder.code import keep_functions
from deploy.run_folder.fingerprints import tensors_in
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.paths import anchored
from deploy.run_folder.reads import reads_of
from deploy.run_folder.tokenizer import run_tokenizer
from deploy.run_folder.weights import (
    require_checkpoints,
    require_earlier_stages,
    require_embedded,
)
from deploy.screen import say
from deploy.stages.session import Session
from deploy.validation.parts import misfits
from deploy.workers.memory import require_room


def prepare_tokenizer(session: Session, config: RunConfig) -> RunConfig:
    """Make the run's tokenizer where it has none; return the config with the model's vocabulary.

    Raises:
        ConfigError: the recipe asks for another tokenizer than the one that results of this run
            depend on, model.vocab_size is not the tokenizer's number of tokens, or
            rollout.stop_ids names a token that it does not have; a checkpoint is of a model that is
            not supported, or embeds fewer tokens.
        CheckpointError: a checkpoint cannot be read.
    """
    config = anchored(config)
    require_checkpoints(config)
    # Where the run is at work already, its tokenizer is there and nothing is written.
    tokenizer = run_tokenizer(session.run_dir, config, lambda: session.lock("train"))
    require_embedded(config, tokenizer.vocab_size)
    if wrong := misfits(config, tokenizer.vocab_size):
        raise ConfigError("; ".join(wrong))
    model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


def say_fitting(console: Console, fitting: Fitting) -> None:
    """Say what became of the records that were too long."""
    for line in fitting.said():
        say(console, (line, "yellow"))


def log_metrics(session: Session, stage: str, step: int, metrics: dict[str, float]) -> None:
    """Append one line to the run's log."""
    log = session.log()
    with at_the_end(log.close):
        log.write(stage, step, metrics)


def check_inputs(session: Session, config: RunConfig, stage: str) -> Callable[[], None]:
    """Make this session the run's writer, and compare a stage's inputs with what the run used.

    Returns a function that records recipe and inputs in the run's folder. The stage calls it once
    it has read its inputs and found them good: before that a refused recipe leaves no trace.

    Raises:
        StorageError: another stage is writing into the run's folder.
        DataError: an input is missing, or has changed since results of this run were made from it.
        ConfigError: the stage would replace what policy training began from.
        ClusterError: its weights do not fit into this machine.
        CheckpointError: an earlier stage has not left the weights that it begins with.

    The function raises ConfigError where the run cannot be begun at one of its trackers.
    """
    require_earlier_stages(stage, config)
    require_room(config, stage)
    session.lock(stage)
    inputs = RunInputs(session.run_dir)
    inputs.require_repeat(stage, config)
    reads = reads_of(stage, config)
    prints, changes = inputs.check(stage, reads)
    for change in changes:
        say(session.console, f"changed: {change}")

    def record() -> None:
        if stage != "train":  # there the controller does it, whose environment counts
            trackers.begin(config)
        save_config(config, session.folder.config)
        keep_functions(session.folder, reads)
        inputs.begin(stage, config, prints)

    return record


def record_end(session: Session, stage: str, *folders: Path) -> None:
    """Record which weights a stage has left in folders."""
    weights = [path for folder in folders if folder.exists() for path in tensors_in(folder)]
    assert weights, f"`{stage}` has left no weights"
    RunInputs(session.run_dir).end(stage, weights)


def require_paths(paths: Sequence[str], field: str, stage: str) -> None:
    """Raise ConfigError where a field that a stage reads names no file."""
    if not paths:
        raise ConfigError(f"{field} is empty; {stage} needs at least one file")


def require_own(name: str, reused: str | None) -> None:
    """Raise ConfigError where a stage would write into the run that its result is taken from."""
    if reused is not None:
        raise ConfigError(
            f"reuse.{name}: this run takes it from {reused}; set reuse.{name} to null to train it"
        )
