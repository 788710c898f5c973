"""Rounds one after the other: ask, train the reward model on all that was said, then the policy.

::

    propose --pairs--> people --answers--> reward --reward model--> train --policy--> propose ...
    RUN/feedback/round-00n                 RUN-round-00n

The reward model begins anew in each round, from the supervised policy and with the answers of all
rounds, and the policy with it (Stiennon 2020, section 3.1). A step is known by what it leaves, so a
loop that was ended, or killed, goes on there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from common.config.quickstart import DocstringsConfig
from common.config.run import DataConfig, RunConfig
from common.errors import ConfigError, StorageError
from common.metric_catalogue import Logged
from common.run_folder import RoundFolder
from deploy.feedback.rounds import close_round, is_closed, rounds_of
from deploy.feedback.store import Store
from deploy.quickstart.task import with_data
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.log_lines import read_lines
from deploy.run_folder.progress import is_final, recorded_facts
from deploy.run_folder.reads import reads_of
from deploy.run_folder.reuse import results_of
from deploy.run_folder.weights import weights_in
from deploy.stages.preparation import require_paths
from deploy.validation.validate import require_stage
from deploy.workers.preflight import require_scorers, require_trainable

Step = Literal["propose", "ask", "reward", "train"]
_LOOK_S = 0.5
"""Between looks at whether everything is answered."""
_GRACE_S = 10.0
"""From the last answer to the end of a round."""
_GOODBYE_S = 3.0
"""For which the page says that it is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The run that a loop is about: its supervised policy, prompts and first comparisons."""

    config: RunConfig

    def run_of(self, number: int) -> RunConfig:
        """Return the recipe of the run whose policy a round leaves; round 0 is the base itself."""
        config = self.config
        if number == 0:
            return config
        answers = tuple(
            str(self.config.folder.round(earlier).comparisons) for earlier in range(1, number + 1)
        )
        data = {"comparisons": (*config.data.comparisons, *answers)}
        reuse = results_of(config).model_copy(update={"reward_model": None})
        return config.model_copy(
            update={
                "name": f"{config.name}-round-{number:03d}",
                "data": config.data.model_copy(update=data),
                "reuse": reuse,
            }
        )

    def next_step(self, number: int) -> Step | None:
        """Return what is to be done of a round; None where it is done.

        Raises:
            DataError: what people said was changed after the reward model had learnt from it, or a
                file is damaged.
        """
        rounds = rounds_of(self.config.folder)
        if number + 1 in rounds:  # people have been asked about the policy that it left
            return None
        if number not in rounds:
            return "propose"
        folder = self.config.folder.round(number)
        if not is_closed(folder) or not folder.comparisons.exists():
            return "ask"
        run = self.run_of(number)
        if not _has_reward_model(run):
            return "reward"
        RunInputs(run.run_dir).check("reward", reads_of("reward", run))
        return None if is_final(recorded_facts(run.run_dir), run) else "train"


def base_of(config: RunConfig) -> Base:
    """Return a run as the base of a loop.

    Raises:
        ConfigError: it has no policy to ask about, or trains without a reward model.
    """
    if not config.reward_service.needs_model:
        raise ConfigError(
            f"{config.run_dir}: its reward has no component of kind model, so answers of people "
            "would change nothing; add one to reward_service.components"
        )
    if recorded_facts(config.run_dir) is None:
        raise ConfigError(
            f"{config.run_dir}: has no trained policy to ask about yet; "
            f"`talipot train --resume {config.run_dir}` trains it"
        )
    return Base(config=with_own_data(config))


def require_runnable(config: RunConfig) -> None:
    """Refuse what training would refuse, before people are asked.

    Args:
        config: of the base.

    Raises:
        TalipotError: names the field, the file or the function.
    """
    require_trainable(config)
    require_scorers(config)
    require_stage(config, "train")
    require_paths(config.data.demonstrations, "data.demonstrations", "centring the reward model")


def with_own_data(config: RunConfig) -> RunConfig:
    """Return the recipe of a quickstart's run with the data that it made for itself."""
    made = config.folder.data
    is_quickstart = isinstance(config.quickstart, DocstringsConfig)
    if is_quickstart and config.data == DataConfig() and made.prompts.exists():
        return with_data(config, made)
    return config


def _has_reward_model(run: RunConfig) -> bool:
    """Whether the stage has come to its end: of several seeds the first leaves weights, too."""
    there = any(file.exists() for file in weights_in(run.folder.reward_model.path))
    lines = read_lines(run.folder.metrics).lines if there else []
    return any(line.stage == "reward" and Logged.EPOCHS in line.metrics for line in lines)


Waiting = Literal["answers", "others", "nothing"]
"""For what a round waits: answers; answers of people who were not there yet; or nothing."""


def waits_for(folder: RoundFolder) -> Waiting:
    """Return what a round waits for. Raises DataError, StorageError."""
    store = Store(folder.answers)
    try:
        if store.is_closed() or (store.left() == 0 and not store.is_read()):
            return "nothing"
        return "answers" if store.is_read() or store.can_go_on() else "others"
    finally:
        store.close()


async def until_answered(folder: RoundFolder, tell: Callable[[str], None]) -> None:
    """Wait until nothing of a round has been wanted for a while, and close it, or until it is.

    Who gave the last answer may take it back in that time, and whoever is there sees it end.

    Args:
        folder: of the round.
        tell: is told once where nobody who is there can answer what is left.
    """
    since: float | None = None
    told = False
    while since is None or time.monotonic() - since < _GRACE_S:
        try:
            waiting = await asyncio.to_thread(waits_for, folder)
        except StorageError:  # it is busy for long: the next look may find it free
            waiting = "answers"
        if waiting == "others" and not told:
            told = True
            tell(
                "nobody who has labelled yet can answer what is left (skipped by all, or wanted of "
                "more people): invite others, or end the round with `talipot feedback close`"
            )
        since = (since or time.monotonic()) if waiting == "nothing" else None
        await asyncio.sleep(_LOOK_S)
    await asyncio.to_thread(close_round, folder)
    await asyncio.sleep(_GOODBYE_S)
