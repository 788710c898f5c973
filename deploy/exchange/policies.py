"""A policy of a run by the word that a user has for it, while the run trains or afterwards.

::

    final    what training ended with
    latest   the newest whole checkpoint
    best     the checkpoint with the highest score (see `_scores`)
    N        the checkpoint of iteration N
    nothing  final where there is one, else latest, and a line that says so

A checkpoint holds what an engine trains. It becomes weights as a stage leaves them in one process,
whatever number of ranks wrote it; neither Ray nor DeepSpeed is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common.config.model import checkpoint_of
from common.config.run import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from common.metric_catalogue import Logged
from common.models.adapter_files import adapter_of, export_merged
from common.models.pretrained.writing import copy_any, take_tokenizer
from common.models.weight_files import save_policy
from common.run_folder import PolicyFolder
from deploy.run_folder import checkpoints
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.log_lines import held_out_scores, read_lines
from deploy.run_folder.weights import final_policy, is_there, policy_start
from learner.zero.state_parts import masters

FINAL, LATEST, BEST = "final", "latest", "best"
_TRIES = 5
"""Reads of a checkpoint that a run removes meanwhile; it keeps its newest for many iterations."""
_HELD_OUT = "judge_score_policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A policy that is there."""

    iteration: int
    """How many iterations it was trained for."""
    checkpoint: Path | None = None
    """Where it lies; None: the final policy."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Of the checkpoint."""
    note: str = ""
    """What to tell the user, in one line; empty where the word said it all."""


def choose(config: RunConfig, word: str | None) -> Chosen:
    """Find a policy by its word.

    Raises:
        ConfigError: the word is none.
        CheckpointError: no such checkpoint, or a damaged one.
        DataError: the final policy is asked for, and the run has not finished; or there is none.
    """
    if word is None:
        return _whatever_is_there(config)
    if word == FINAL:
        if not is_there(config.folder.policy):
            raise DataError(
                f"{config.run_dir}: not finished, so there is no final policy; --checkpoint latest "
                "takes that of its newest checkpoint"
            )
        return Chosen(iteration=_final_iteration(config))
    if word == LATEST:
        newest = checkpoints.newest(config.run_dir)
        if newest is None:
            raise CheckpointError(f"{config.run_dir}: no checkpoint yet")
        return _of(*newest)
    if word == BEST:
        return _best(config)
    if not word.isdecimal():
        raise ConfigError(f"--checkpoint {word}: should be a number, {LATEST}, {BEST} or {FINAL}")
    folder = config.folder.checkpoint(int(word))
    if not folder.exists():
        names = ", ".join(str(number) for number in _numbers(config)) or "none"
        raise CheckpointError(f"{folder}: no such checkpoint; there are {names}")
    if not checkpoints.is_whole(folder):
        raise CheckpointError(f"{folder}: damaged; take another")
    return _of(folder, _state(folder))


@contextmanager
def policy_of(config: RunConfig, word: str | None) -> Iterator[tuple[Chosen, Path]]:
    """Give a policy and its weights, as `final_policy` gives the final one's.

    Those of a checkpoint lie in a temporary folder until the context ends.

    Raises:
        TalipotError: as `choose`.
    """
    chosen = choose(config, word)
    if chosen.checkpoint is None:
        RunInputs(config.run_dir).require_result("train")
        yield chosen, final_policy(config)
        return
    with TemporaryDirectory(prefix="talipot-policy-") as name:
        folder = PolicyFolder(Path(name) / "policy")
        chosen = write_policy(config, word, folder.path)
        yield chosen, folder.weights if checkpoint_of(config.model) is None else folder.path


def write_policy(config: RunConfig, word: str | None, folder: Path) -> Chosen:
    """Write all of a policy into a new folder, as a stage would leave it.

    Raises:
        TalipotError: as `choose`.
    """
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        chosen = choose(config, word)
        try:
            _write(config, chosen, folder)
        except (CheckpointError, OSError):
            if chosen.checkpoint is None or chosen.checkpoint.exists():
                raise
            continue  # the run that trains has removed it, and has newer ones
        return chosen
    raise CheckpointError(
        f"{config.folder.checkpoints}: the run removes its checkpoints faster than they can be "
        "read; raise train.keep_checkpoints, or wait"
    )


def _write(config: RunConfig, chosen: Chosen, folder: Path) -> None:
    if chosen.checkpoint is None:
        RunInputs(config.run_dir).require_result("train")
        for path in config.folder.policy.path.iterdir():
            copy_any(path, folder / path.name)
        if checkpoint_of(config.model) is None:
            _add_tokenizer(config, folder)
        return
    weights = dict(masters(chosen.checkpoint / "policy"))
    weights.setdefault("value.offset", torch.zeros(1))
    base, model, lora = policy_start(config), config.model, config.train.lora
    if lora is None:
        save_policy(weights, folder, model, base)
    else:
        adapter = adapter_of(weights, config.train.adapter, lora, chosen.state["learner"]["base"])
        export_merged(adapter, weights, base, folder, model)
    if base.is_dir():
        take_tokenizer(config.folder.tokenizer, folder)
    else:
        text = json.dumps(model.model_dump(), indent=1)
        PolicyFolder(folder).shape.write_text(text, encoding="utf8")
        _add_tokenizer(config, folder)


def _add_tokenizer(config: RunConfig, folder: Path) -> None:
    """Put the run's own tokenizer beside a policy of our own, which is text to nobody without."""
    shutil.copyfile(config.folder.tokenizer, PolicyFolder(folder).tokenizer)


def _whatever_is_there(config: RunConfig) -> Chosen:
    """Take the final policy, or the newest checkpoint where training goes or went on after it."""
    final = _final_iteration(config) if is_there(config.folder.policy) else -1
    newest = checkpoints.newest(config.run_dir)
    if newest is None or newest[1]["iteration"] <= final:
        if final < 0:
            raise DataError(
                f"{config.run_dir}: not finished, and no checkpoint is there yet; `talipot train "
                "--resume RUN` goes on with it, and train.checkpoint_every says how often it "
                "writes one"
            )
        return Chosen(iteration=final)
    iteration: int = newest[1]["iteration"]
    return Chosen(
        iteration=iteration,
        checkpoint=newest[0],
        state=newest[1],
        note=f"not finished: the policy of checkpoint {iteration} of {config.train.iterations} "
        "iterations",
    )


def _best(config: RunConfig) -> Chosen:
    """Take the whole checkpoint with the highest score."""
    scores, what = _scores(config)
    for score, number in sorted(((score, n) for n, score in scores.items()), reverse=True):
        folder = config.folder.checkpoint(number)
        if checkpoints.is_whole(folder):
            note = f"best of {len(scores)} checkpoints: iteration {number}, {what} {score:.4g}"
            return Chosen(iteration=number, checkpoint=folder, state=_state(folder), note=note)
    if numbers := _numbers(config):
        raise CheckpointError(
            f"{config.folder.checkpoints}: no whole checkpoint of {len(numbers)} has a score in "
            f"{config.folder.metrics.name}; name one by its number"
        )
    raise CheckpointError(f"{config.run_dir}: no checkpoint yet")


def _scores(config: RunConfig) -> tuple[dict[int, float], str]:
    """Return what each checkpoint is compared by, and what that is.

    It is the judge's score of `talipot evaluate` on held-out prompts where each of them was
    evaluated; else the run's own score of those that were evaluated while it was trained
    (`evaluate.every`); else the mean score of the rollouts that its last iteration was trained on.
    """
    numbers = _numbers(config)
    held_out = {number: _evaluated(config, number) for number in numbers}
    known = {number: score for number, score in held_out.items() if score is not None}
    if known and len(known) == len(numbers):
        return known, "held-out score"
    metric = config.evaluate.logged_metric
    while_training = held_out_scores(config.folder.metrics, metric=metric)
    if asked := {n: while_training[n] for n in numbers if n in while_training}:
        return asked, f"held-out {metric} while training"
    logged = {
        line.step: line.metrics[Logged.SCORE]
        for line in read_lines(config.folder.metrics).lines
        if line.stage == "train" and Logged.SCORE in line.metrics
    }
    return {n: logged[n] for n in numbers if n in logged}, "mean score of its iteration"


def _evaluated(config: RunConfig, iteration: int) -> float | None:
    path = config.folder.evaluation_of(iteration)
    if not path.exists():
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf8"))[_HELD_OUT])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; remove it, or evaluate that checkpoint again") from None


def _numbers(config: RunConfig) -> list[int]:
    """List the iterations of which there is a checkpoint, whole or not."""
    names = (p.name for p in config.folder.checkpoints.glob("step-*") if not p.suffix)
    return sorted(int(n.removeprefix("step-")) for n in names if n[5:].isdecimal())


def _final_iteration(config: RunConfig) -> int:
    """Return how many iterations the final policy was trained for, as the run recorded it."""
    try:
        facts = json.loads(config.folder.result.read_text(encoding="utf8"))
        return int(facts["iterations"])
    except (OSError, ValueError, KeyError, TypeError):
        return config.train.iterations


def _of(folder: Path, state: Mapping[str, Any]) -> Chosen:
    return Chosen(iteration=state["iteration"], checkpoint=folder, state=state)


def _state(folder: Path) -> Mapping[str, Any]:
    state: Mapping[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf8"))
    return state
