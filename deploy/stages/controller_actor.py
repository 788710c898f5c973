"""The controller of a run as a Ray actor: started, found and asked by name.

::

    talipot train --start or find--> ControllerActor (named RUN:controller, detached)
         ^                                | owns, and builds again
         '-------- status, outcome -------'--> learner gang, rollout actors, reward workers

The run belongs to the controller, not to the command: a driver that dies on a cluster that lives on
leaves the run at work, and the next ``--resume`` attaches to it. A controller never outlives its
use: its own workers end with the run, and it ends once its outcome was fetched, or `LINGER_S` after
the run if nobody comes for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.errors import ConfigError, WorkerError
from deploy.control.controller import Controller
from deploy.control.status import Status
from deploy.run_folder.resume_rules import changes
from deploy.workers.calls import Answer, Handle, kill, start
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import NAMESPACE
from deploy.workers.pool import Pool
from deploy.workers.scaling import Scaled

LINGER_S = 600.0
"""How long a controller keeps the outcome of an ended run for a driver to fetch it."""
_RETRY_S = 0.25
_ANSWER_S = 10.0
_NAME_FREE_S = 60.0
_ELSEWHERE = ("name", "output", "cluster.")
"""Fields that say where a run is looked at from."""


class ControllerActor(Controller):
    """A controller as a Ray actor: works in a thread of its own, whoever asks or leaves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = threading.Event()
        self._facts: dict[str, Any] | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="run", daemon=True).start()

    def recipe(self) -> RunConfig:
        """Return the recipe that is being run."""
        return self.config

    def outcome(self, wait_s: float) -> dict[str, Any] | None:
        """Return the run's facts, None while it works; raises what stopped the run."""
        self._ended.wait(wait_s)
        if self._error is not None:
            raise self._error
        return self._facts

    def _work(self) -> None:
        try:
            self._facts = self.run()
        except BaseException as error:  # handed to whoever asks for the outcome
            self._error = error
        self._ended.set()
        time.sleep(LINGER_S)
        os._exit(0)


class RemoteController:
    """A run's controller, asked from another process; a question has a deadline.

    Each question raises WorkerError when the controller does not answer in time, and Ray's own
    errors when it died or raised.
    """

    def __init__(self, actor: Handle, config: RunConfig) -> None:
        self._actor, self._config = actor, config

    @classmethod
    def named_by(cls, config: RunConfig) -> RemoteController:
        """Find the controller by its run's name. Raises ValueError where there is none."""
        return cls(ray.get_actor(controller_name(config), namespace=NAMESPACE), config)

    def recipe(self) -> RunConfig:
        """Return the recipe that it runs."""
        return self._answer(start(self._actor, ControllerActor.recipe))

    def status(self, within_s: float = _ANSWER_S) -> Status:
        """Return how far the run is."""
        return self._answer(start(self._actor, ControllerActor.status), within_s)

    def scale(self, actors: int | None, replicas: int | None) -> list[Scaled]:
        """Wish for other numbers of workers; None leaves one as it is."""
        return self._answer(start(self._actor, ControllerActor.scale, actors, replicas))

    def outcome(self) -> dict[str, Any] | None:
        """Return the run's facts, None while it works; raises what stopped the run."""
        return self._answer(self.start_outcome(0.0))

    def start_outcome(self, wait_s: float) -> ray.ObjectRef[dict[str, Any] | None]:
        """Ask for the outcome, which the controller waits for so long before it answers."""
        return start(self._actor, ControllerActor.outcome, wait_s)

    def stop(self) -> None:
        """Ask the run to end with a checkpoint."""
        start(self._actor, ControllerActor.stop)

    def end(self) -> None:
        """End the controller's process."""
        kill(self._actor)

    def _answer(self, ref: ray.ObjectRef[Answer], within_s: float = _ANSWER_S) -> Answer:
        try:
            return ray.get(ref, timeout=within_s)
        except ray.exceptions.GetTimeoutError:
            folder = self._config.run_dir
            raise WorkerError(
                f"the controller of {folder} does not answer within {within_s:.0f} s; try "
                f"again, or end its cluster and carry on with `talipot train --resume {folder}`"
            ) from None


def controller_name(config: RunConfig) -> str:
    """Return the name that a run's controller has in namespace `NAMESPACE`."""
    return f"{config.name}:controller"


def start_controller(
    config: RunConfig,
    prompts: Sequence[EncodedPrompt],
    gang: LearnerGang,
    pools: tuple[Pool, Pool],
    stop_after: int | None,
    held_out: Sequence[EncodedPrompt] = (),
    *,
    detached: bool,
) -> RemoteController:
    """Start the controller, which begins to work at once.

    It is to be detached when all workers are its own, so that nothing it needs ends with the
    driver.
    """
    options: dict[str, Any] = {
        "name": controller_name(config),
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_concurrency": 8,
        "lifetime": "detached" if detached else None,
    }
    actor = ray.remote(ControllerActor).options(**options)
    deadline = time.monotonic() + _NAME_FREE_S
    while True:
        try:
            handle = actor.remote(config, prompts, gang, *pools, stop_after, held_out)
            return RemoteController(handle, config)
        except ValueError:  # the name's last holder is dead, and Ray has not freed the name yet
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def living_controller(config: RunConfig) -> RemoteController | None:
    """Return the controller that works on this run, or has finished it; None where there is none.

    One whose run failed or was stopped is ended, to free its name.

    Raises:
        ConfigError: another folder's run of this name is at work, or this one by another recipe.
        WorkerError: it does not answer.
    """
    try:
        controller = RemoteController.named_by(config)
        recipe = controller.recipe()
    except (ValueError, ray.exceptions.RayActorError):
        return None
    if recipe.run_dir.resolve() != config.run_dir.resolve():
        raise ConfigError(
            f"a run called '{config.name}' of another folder ({recipe.run_dir}) is at work on this "
            "cluster; set name to another one"
        )
    try:
        facts = controller.outcome()
    except ray.exceptions.RayError:
        facts = {"finished": False}
    if facts is None:
        changed = [c for c in changes(recipe, config, 0) if not c.field.startswith(_ELSEWHERE)]
        if changed:
            raise ConfigError(
                f"{config.run_dir} is at work under another recipe: "
                f"{'; '.join(map(str, changed))}; stop it first, or attach to it with what it was "
                "started with"
            )
    if facts is None or facts["finished"]:
        return controller
    controller.end()
    return None
